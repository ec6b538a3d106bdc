"""A character language model on fastrnn's layers: `python -m fastrnn lm train|sample|demo`."""
