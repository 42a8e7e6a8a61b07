"""The report of a run: `report.json` with every number, `report.html` to look at, `report.md` for a model card.

`build` reads the run's folder into one dict of plain JSON; `page` and `markdown` render it with the templates beside
them. `figures` and `curves` draw in the style of `theme`. `table` is shared with the command line.
"""
