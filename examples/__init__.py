"""Small programs on fastrnn's layers: `./run examples`, `python -m examples.translation`. See README.md."""
