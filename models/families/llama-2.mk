# Meta's Llama 2 in every size. make weights fetches it; or put the folder (or a link to it) at weights/NAME, or say
# WEIGHTS=/path.
WEIGHTS = weights/$(MODEL)
SOURCE = meta:$(MODEL)
# float16 is what Meta's own inference code computes in, and all that a V100 can do
DTYPE = float16
TP = 2
LICENSE = llama2
CONTEXT = 4096
MAX_SEQ_LEN = 4096
MAX_BATCH_SIZE = 8
