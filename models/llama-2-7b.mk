# Meta's Llama 2 7B
include models/families/llama-2.mk
