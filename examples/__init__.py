"""Models for fastrnn's layers, one program a family: ``python -m examples`` lists them."""
