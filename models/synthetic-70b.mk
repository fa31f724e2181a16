# `make synthetic MODEL=synthetic-70b` writes 7.9 GB, because layers repeat each other's numbers; the ranks' files
# have 138 GB
include models/families/synthetic.mk
MAX_BATCH_SIZE = 64
