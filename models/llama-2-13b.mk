# Meta's Llama 2 13B
include models/families/llama-2.mk
