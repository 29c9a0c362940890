"""What a run measures, and what it writes for people to read.

measure.py            what is measured; most of report.json
cached_evaluation.py  cached scores of the original, and the digest of a run's inputs
report_json.py        writes and reads report.json
output_folder.py      the output folder, complete or not there at all
summary.py            rows and sentences about a run, shared by the next three
console_table.py      the table on the console, and log.txt
page.py               report.html, for one run or several
card.py               README.md, the model card
figures.py            the figures of one run; frontier.py: of several; layers.py: names of layers
plots.py              renders the figures as SVG and PNG
templates/            the page and the card
"""
