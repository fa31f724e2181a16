# Meta's Llama 2 13B
include models/shared/llama-2.mk
