# `make synthetic MODEL=synthetic-13b` writes it, 26 GB
include models/families/synthetic.mk
