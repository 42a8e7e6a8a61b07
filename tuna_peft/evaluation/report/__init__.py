"""The report of a run: `report.json` with every number, `report.html` to look at, `report.md` for a model card.

The way the data flows: `build` reads the run's folder -> one dict of plain JSON -> `page` (with `figures` on `svg`)
and `markdown` write it down. `table` is the table of stages that both share with the terminal.
"""
