# llama-2-7b-chat: Meta's Llama 2. make weights fetches it; or put the folder (or a link to it) at weights/llama-2-7b-chat, or say WEIGHTS=/path.
WEIGHTS = weights/llama-2-7b-chat
SOURCE = meta:llama-2-7b-chat
# float16 is what Meta's own inference code computes in, and all that a V100 can do
DTYPE = float16
TP = 2
LICENSE = llama2
CONTEXT = 4096
MAX_SEQ_LEN = 4096
MAX_BATCH_SIZE = 8
# Meta's files have none
CHAT_TEMPLATE = models/llama-2.jinja
