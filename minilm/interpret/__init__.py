"""The model explained by itself.

- `trace.py`    every number between a text and its vector, by name
- `explain.py`  a similarity as a sum of its parts
- `tour.py`     a page of both that works offline; `figures.py` has what its figures show, and
                `templates/` how it looks: a file a step

May import the files at the top of the package, `inference/` and `pretrained/`.
"""
