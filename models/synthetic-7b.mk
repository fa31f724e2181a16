# `make synthetic` writes it, 13.5 GB
include models/families/synthetic.mk
