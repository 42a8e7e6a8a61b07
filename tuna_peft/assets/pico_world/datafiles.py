def write(folder, seed): pass
