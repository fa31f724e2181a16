# Meta's Llama 2 7B, the chat version. Meta's files have no chat template
include models/families/llama-2.mk
CHAT_TEMPLATE = models/llama-2.jinja
