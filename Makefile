# trtllm-bake: a Llama 2 from Meta's weights to a serving Triton, one room after another.
# A room is a directory under build/; its manifest.json is written last and is what make looks at (README, "Rooms").

## trtllm-bake: Meta's Llama 2 weights -> Hugging Face -> TensorRT-LLM checkpoint -> engines -> Triton, one room after another.
##
##   make demo                     the bundled model, served by two ranks, asked, stopped
##   make serve MODEL=llama-2-7b   a preset of models/, or MODEL=/path/to/a/folder; stays until Ctrl-C
##

MAKEFLAGS += --no-builtin-rules --warn-undefined-variables --no-print-directory
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.SECONDEXPANSION:
.DEFAULT_GOAL := help

# --- settings: from the command line, else the model's preset in models/, else these. The environment never decides. ---

MODEL          = stories
ENGINE         = torch
TP             = 2
# float16, bfloat16 or float32; empty: the dtype of the weights themselves
DTYPE          =
TOOLCHAIN      = 0.8.0
WEIGHTS        =
# positions the model was trained on; empty: what the weights say
CONTEXT        =
MAX_BATCH_SIZE = 8
# tokens of a prompt, of prompt and answer together, and of one engine step; empty: from CONTEXT (scripts/build_engines.py)
MAX_INPUT_LEN  =
MAX_SEQ_LEN    =
MAX_NUM_TOKENS =
HOST           = 127.0.0.1
HTTP_PORT      = 8000
GRPC_PORT      = 8001
METRICS_PORT   = 8002
OPENAI_PORT    = 9000
PROMPT         = Once upon a time
MAX_TOKENS     = 48
# an interpreter that has requirements/run.txt and torch.txt; empty: .venv, made when missing or when the lock changed
PYTHON         =
ASSUME_GPU     =

# which tests, for instance TESTS=tests/test_serve.py; what to bench, see scripts/bench_convert.py
TESTS          =
BENCH          =

SETTINGS = MODEL ENGINE TP DTYPE TOOLCHAIN WEIGHTS CONTEXT MAX_BATCH_SIZE MAX_INPUT_LEN MAX_SEQ_LEN MAX_NUM_TOKENS \
           HOST HTTP_PORT GRPC_PORT METRICS_PORT OPENAI_PORT MAX_TOKENS PYTHON ASSUME_GPU
# What was typed is taken as it is: a $ is a $, not a variable.
TYPED := $(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $v)),$v))
$(foreach v,$(filter $(SETTINGS),$(TYPED)),$(eval override $v := $$(strip $$(value $v))))
# what was typed, a setting to a line, for reports that end in a command
define NEWLINE


endef
export BAKE_SETTINGS := $(foreach v,$(filter $(SETTINGS),$(TYPED)),$v=$($v)$(NEWLINE))
# free text reaches the scripts through the environment: no quoting can break it
override PROMPT := $(value PROMPT)
export PROMPT
# these would mix other packages into PYTHON or .venv
unexport PYTHONHOME PYTHONPATH PYTHONSAFEPATH

# REFUSED names the settings that cannot be right; scripts/settings.py tells the user why. First what would break this makefile.
NOTHING     :=
HASH        := \#
NOT_A_WORD   = $$ $(HASH) % ; ' " ` & | < > ( ) [ ] { } * ? ! ~ \$(NOTHING)
REFUSED     := $(foreach v,$(SETTINGS),$(if $(strip $(foreach c,$(NOT_A_WORD) $(if $(filter HOST,$v),,:),$(findstring $c,$($v))) \
                 $(filter-out 0 1,$(words $($v)))),$v))
# a name that is no setting: a slip of the finger must not serve another model (a make above ours may have names of its own)
REFUSED     += $(if $(filter 0,$(MAKELEVEL)),$(filter-out $(SETTINGS) PROMPT TESTS BENCH,$(TYPED)))

# A model is a preset's name, or a folder (then it has a slash).
ifneq ($(strip $(REFUSED)),)
  NAME := refused
else ifneq ($(findstring /,$(MODEL)),)
  REFUSED += $(if $(WEIGHTS),WEIGHTS)
  WEIGHTS := $(MODEL)
  NAME := $(shell path=$$(realpath -m '$(MODEL)'); printf %s "$${path##*/}" | tr -c '[:alnum:]._+@=,\200-\377-' _; \
            printf -- -; printf %s "$$path" | sha256sum | cut -c1-8)
else
  NAME := $(MODEL)
  -include models/$(MODEL).mk
  REFUSED += $(if $(wildcard models/$(MODEL).mk),,MODEL)
endif
check = [[ '$($1)' =~ ^($2)$$ ]] || echo $1;
ifeq ($(strip $(REFUSED)),)
  REFUSED := $(shell $(call check,ENGINE,torch|tensorrt) $(call check,DTYPE,|float16|bfloat16|float32) $(call check,HOST,.+) \
    $(foreach v,TP MAX_BATCH_SIZE MAX_TOKENS HTTP_PORT GRPC_PORT METRICS_PORT OPENAI_PORT,$(call check,$v,[1-9][0-9]*)) \
    $(foreach v,CONTEXT MAX_INPUT_LEN MAX_SEQ_LEN MAX_NUM_TOKENS,$(call check,$v,|[1-9][0-9]*)) \
    grep -qsF '    "$(TOOLCHAIN)":' docker/toolchains.json || echo TOOLCHAIN; \
    [ -d '$(WEIGHTS)' ] || echo WEIGHTS; [ -z '$(PYTHON)' ] || type -P '$(PYTHON)' >/dev/null || echo PYTHON)
endif
REFUSE := $(if $(strip $(REFUSED)),refuse)

# --- where things are ---

VENV    := .venv
PY       = $(or $(PYTHON),$(VENV)/bin/python)
# what has to be installed before a script runs; nothing, when an interpreter was given
HAS     := $(if $(PYTHON),,$(VENV)/locks/)
HF      := build/$(NAME)/hf
VARIANT := build/$(NAME)/$(or $(REFUSE),$(ENGINE)-$(TOOLCHAIN)-tp$(TP)-$(or $(DTYPE),source))
LOCK    := $(shell cat requirements/run.txt requirements/torch.txt | sha256sum | cut -c1-12)
# Weights are not ours: where they are, their names, sizes and times stand for their content. In the C locale and without CDPATH,
# because the environment never decides.
SEEN    := $(if $(REFUSE),,$(shell realpath -m --relative-base=. '$(WEIGHTS)'; CDPATH= cd -- '$(WEIGHTS)' && find -L . ../tokenizer.model \
             -maxdepth 1 -type f -not -name '.*' -printf '%p %s %T@\n' 2>/dev/null | LC_ALL=C sort))

# --- what each room is asked to be; the room keeps it in its file `args`, written by room.py from ROOM_ARGS ---
# The question may hold a path of this machine; the answer (every other file of a room) never does.

hf_ARGS         = --max-position-embeddings=$(CONTEXT)
checkpoint_ARGS = --hf $(HF) --tp-size $(TP) --dtype=$(DTYPE) --trtllm-version $(TOOLCHAIN)
engines_ARGS    = --checkpoint $(VARIANT)/checkpoint --engine $(ENGINE) --trtllm-version $(TOOLCHAIN) \
                  --max-batch-size=$(MAX_BATCH_SIZE) --max-input-len=$(MAX_INPUT_LEN) --max-seq-len=$(MAX_SEQ_LEN) \
                  --max-num-tokens=$(MAX_NUM_TOKENS)
verified_ARGS   = --engines $(VARIANT)/engines --hf $(HF)
model_repo_ARGS = --engines $(VARIANT)/engines --hf $(HF) --trtllm-version $(TOOLCHAIN)

# hf depends on the model alone; the rooms after it also on the pinned packages that made them. The count of files tells when
# one was taken away, which leaves no newer time behind.
asked   = $(if $(filter hf,$1),$(SEEN),lock=$(LOCK) files=$(words $($1_CODE))) $($1_ARGS)
changed = $(if $(subst x$(file <$2/args),,x$(call asked,$1))$(subst x$(call asked,$1),,x$(file <$2/args)),FORCE)

# --- the journey ---

help: ## this page
	@awk '/^## ?/ {sub(/^## ?/, ""); print} /^[a-z_-]+:.*## / {split($$0, a, /:.*## /); printf "  %-13s %s\n", a[1], a[2]}' Makefile

doctor: ## what this machine has and lacks for the journey
	@$(if $(wildcard $(PY)),$(PY),python3) -m scripts.doctor --weights "$(WEIGHTS)" --python "$(PY)" $(ADDRESS)

hf: $(HF)/manifest.json ## weights -> one Hugging Face model
checkpoint: $(VARIANT)/checkpoint/manifest.json ## -> a TensorRT-LLM checkpoint, one file per rank
engines: $(VARIANT)/engines/manifest.json ## -> one engine per rank
verified: $(VARIANT)/verified/manifest.json ## the engines say what Hugging Face's model says: a report
model_repo: $(VARIANT)/model_repo/manifest.json ## -> Triton's model repository, every hole filled

serve: model_repo ## serve it; Ctrl-C ends
	@exec $(PY) -m scripts.serve --root $(VARIANT) $(ADDRESS)

ask: | $(REFUSE) $(addsuffix run.txt,$(HAS)) ## stream an answer from the running server: make ask PROMPT="Once upon a time" MAX_TOKENS=48
	@$(PY) -m scripts.ask --host $(HOST) --grpc-port $(GRPC_PORT) --max-tokens $(MAX_TOKENS)

demo: model_repo ## serve, ask, stop
	@$(PY) -m scripts.demo --root $(VARIANT) $(ADDRESS) --max-tokens $(MAX_TOKENS)

ADDRESS = --host $(HOST) --http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) --metrics-port $(METRICS_PORT)

# Who reads whom.
$(VARIANT)/checkpoint/manifest.json: $(HF)/manifest.json
$(VARIANT)/engines/manifest.json:    $(VARIANT)/checkpoint/manifest.json
$(VARIANT)/verified/manifest.json:   $(VARIANT)/engines/manifest.json $(HF)/manifest.json
$(VARIANT)/model_repo/manifest.json: $(VARIANT)/engines/manifest.json $(HF)/manifest.json

# Which code and tables make what (tests/test_makefile.py compares this with the scripts' imports).
hf_CODE         = scripts/build_hf.py scripts/room.py scripts/hf_model.py scripts/llama_shape.py scripts/meta_weights.py \
                  scripts/safetensors_file.py scripts/tokenizer.py
checkpoint_CODE = scripts/build_checkpoint.py scripts/room.py scripts/contracts.py scripts/hf_model.py scripts/llama_shape.py \
                  scripts/safetensors_file.py $(call tables,checkpoint-config)
engines_CODE    = scripts/build_engines.py scripts/room.py scripts/contracts.py $(call tables,engine-config)
verified_CODE   = scripts/build_verified.py scripts/room.py scripts/answers.py scripts/compare.py scripts/hf_model.py scripts/llama_shape.py \
                  scripts/processes.py scripts/safetensors_file.py scripts/serve.py scripts/verified_report.py models/prompts.txt \
                  $(wildcard model_repo_template/tensorrt_llm/1/*.py)
model_repo_CODE = scripts/build_model_repo.py scripts/room.py scripts/contracts.py $(call tables,backend) docker/engines.json $(TEMPLATES)
tables          = docker/toolchains.json $(wildcard docker/contracts/$1/*.json)
TEMPLATES       = $(wildcard model_repo_template/*/config.pbtxt model_repo_template/*/1/*.py)

# How any room is filled. room.py asks make's own question again when it has the lock: another make may have answered it.
# private: the packages, which a room needs too, have no such question.
needs = $(if $(findstring B,$(firstword -$(MAKEFLAGS))),,$(filter-out FORCE,$^))
$(HF)/manifest.json:        private export ROOM_NEEDS = $(needs)
$(VARIANT)/%/manifest.json: private export ROOM_NEEDS = $(needs)
$(HF)/manifest.json: private export ROOM_ARGS = $(call asked,hf)
$(VARIANT)/%/manifest.json: private export ROOM_ARGS = $(call asked,$*)
$(HF)/manifest.json: $(hf_CODE) $$(call changed,hf,$$(@D)) | $(REFUSE) $(addsuffix run.txt,$(HAS))
	@$(PY) -m scripts.build_hf --weights $(WEIGHTS) $(hf_ARGS) --output $(@D)
$(VARIANT)/%/manifest.json: $$($$*_CODE) $$(call changed,$$*,$$(@D)) | $(addsuffix run.txt,$(HAS))
	@$(PY) -m scripts.build_$* $($*_ARGS) --output $(@D)
$(VARIANT)/verified/manifest.json: | $(addsuffix verify.txt,$(HAS))

refuse: export REFUSED_SETTINGS = $(foreach v,$(SETTINGS),$v=$($v)$(NEWLINE))
refuse: export REFUSED_NAMES = $(REFUSED)
refuse:
	@$(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,python3) -m scripts.settings

# --- the packages, pinned by hash (README, "Packages") ---

$(VENV)/locks/run.txt: requirements/torch.txt requirements/torch-cuda.txt scripts/make_venv.sh $(if $(wildcard $(VENV)/bin/python),,FORCE)
$(addprefix $(VENV)/locks/,verify.txt test.txt dev.txt): $(VENV)/locks/run.txt
$(VENV)/locks/%.txt: requirements/%.txt | $(REFUSE)
	@scripts/make_venv.sh $(VENV) $*

##
## Development:

test: $(addprefix $(HAS),$(if $(HAS),run.txt verify.txt test.txt)) ## every test that this machine can run
	@$(PY) -m pytest -q $(TESTS)
lint: $(addprefix $(HAS),$(if $(HAS),run.txt test.txt dev.txt)) ## ruff, mypy, shellcheck, mbake
	@$(PY) -m ruff check . && $(PY) -m ruff format --check --diff scripts tests && $(PY) -m mypy
	@$(dir $(PY))shellcheck scripts/*.sh .ci/run && $(dir $(PY))mbake validate Makefile
lock: $(addsuffix dev.txt,$(HAS)) ## write the lock files anew from requirements/*.in
	@scripts/lock.sh $(PY)
bench-serve: model_repo ## time to ready, 8 streams against one: ratios from one run
	@$(PY) -m scripts.bench_serve --root $(VARIANT) $(ADDRESS)
bench-convert: $(addsuffix run.txt,$(HAS)) ## conversion against cp and sync: ratios from one run
	@$(PY) -m scripts.bench_convert $(BENCH)
clean: ## remove every room; fetched weights stay
	rm -rf build/*

.PHONY: help doctor hf checkpoint engines verified model_repo serve ask demo test lint lock bench-serve bench-convert clean refuse FORCE
