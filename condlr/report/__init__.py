"""From collected results to what a person looks at.

In all modules `cells`, `history`, `shifted`, `audits` and the other frames are tables of a study as
`condlr.report.results.read` gives them, and `paper` is the directory of published numbers.
"""
