# stories: the bundled default, a 4.7M-parameter Llama 2 in Meta's own format (models/stories/ABOUT.md).
WEIGHTS = models/stories
DTYPE = float16
# it was trained on 512 positions; Meta's params.json has no place for this number
CONTEXT = 512
LICENSE = Apache-2.0
MAX_SEQ_LEN = 512
MAX_BATCH_SIZE = 16
