# trtllm-bake: a Llama 2 from Meta's weights to a serving Triton, one room after another.
# A room is a directory under build/; its manifest.json is written last and is what make looks at (README, "The journey").

## trtllm-bake: Meta's Llama 2 weights -> Hugging Face -> TensorRT-LLM checkpoint -> engines -> Triton, one room after another.
##
##   make demo                     the bundled model, served by two ranks, asked, stopped
##   make serve MODEL=llama-2-7b   a preset of models/, or MODEL=/path/to/a/folder; stays until Ctrl-C
##

# n or q where make was only asked (make -n, -q): it then answers without writing
ASKED := $(strip $(foreach c,n q,$(findstring $c,$(filter-out --%,$(firstword -$(MAKEFLAGS))))))
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
# pipeline stages, each of TP ranks; more than one with ENGINE=tensorrt only
PP             = 1
# float16, bfloat16 or float32; empty: the dtype of the weights themselves
DTYPE          =
# int8_wo, int4_awq, fp8 or sq, by TensorRT-LLM's own tools, with ENGINE=tensorrt only; empty: the weights stay as they are
QUANT          =
# on: heads of zeros are added where TP does not divide the heads (for instance 9 heads at TP=2)
PAD_HEADS      = off
# a TensorRT-LLM of docker/toolchains.json; empty: for ENGINE=torch its first, for ENGINE=tensorrt the newest that runs on the GPU
TOOLCHAIN      =
WEIGHTS        =
# where they are fetched from when they are not there (scripts/fetching/sources.py): hf:NAME/MODEL@COMMIT, https://host/folder, s3://bucket/folder, ...
SOURCE         =
# positions the model was trained on; empty: what the weights say
CONTEXT        =
MAX_BATCH_SIZE = 8
# tokens of a prompt, of prompt and answer together, and of one engine step; empty: from CONTEXT (scripts/build_engines.py)
MAX_INPUT_LEN  =
MAX_SEQ_LEN    =
MAX_NUM_TOKENS =
# off: one response a request (decoupled: false), for clients of gRPC ModelInfer and HTTP infer; on: streams
STREAMING      = on
# on: requests share the KV cache of what their prompts begin with; with ENGINE=tensorrt only, and engines built for it
KV_REUSE       = off
HOST           = 127.0.0.1
HTTP_PORT      = 8000
GRPC_PORT      = 8001
METRICS_PORT   = 8002
OPENAI_PORT    = 9000
# a Jinja file; empty: the model's own, if it has one
CHAT_TEMPLATE  =
# keys that clients of the OpenAI-compatible endpoint need, one a line; empty: none, or the variable BAKE_API_KEY
API_KEY_FILE   =
PROMPT         = Once upon a time
MAX_TOKENS     = 48
# an interpreter that has requirements/run.txt and torch.txt; empty: .venv, made when missing or when the lock changed
PYTHON         =
# instead of looking at the GPUs, in make plan, doctor and -n: ASSUME_GPU="4x V100-SXM2-16GB"
ASSUME_GPU     =
# ENGINE=tensorrt with stand-ins for docker, GPUs and trtllm-build, on this machine (docker/rehearsal): REHEARSAL="2x A100-80GB"
REHEARSAL      =

# which tests, for instance TESTS=tests/test_serve.py; what to bench, see scripts/bench/convert.py
TESTS          =
BENCH          =
# of make bench: loads as input:output:streams; an older run to be held against; runs of other TP for the same page; PEERS=on: others too
POINTS         =
BASELINE       =
WITH           =
PEERS          =
# of make fsck: one room by its name, or a folder; empty: all that are made
ROOM           =
# JSON=1: plan, doctor and fsck answer in JSON
JSON           =
# of make release; INFERRED=accept: tables without a primary source may be used (docker/contracts/README.md)
VERSION        =
INFERRED       =
# of make image: another base than NVIDIA's, or than the one made from Debian packages; cpu or cuda, which PyTorch; docker or buildah,
# empty: docker where its daemon answers, else buildah; NO_CACHE=1: from nothing
BASE_IMAGE     =
TARGET         = cpu
BUILDER        =
NO_CACHE       =
# of make verify-image, push: which image, or file; of make release: the model's licence (models/*.mk), a key to sign with
IMAGE          =
LICENSE        =
KEY            =
# of make chart: one host of the cluster, NODE="8x H100-80GB"; a model that it cannot hold is refused
NODE           =

SETTINGS = MODEL ENGINE TP PP DTYPE QUANT PAD_HEADS TOOLCHAIN WEIGHTS SOURCE CONTEXT MAX_BATCH_SIZE MAX_INPUT_LEN MAX_SEQ_LEN MAX_NUM_TOKENS \
           STREAMING KV_REUSE HOST HTTP_PORT GRPC_PORT METRICS_PORT OPENAI_PORT CHAT_TEMPLATE API_KEY_FILE MAX_TOKENS PYTHON \
           ASSUME_GPU REHEARSAL TARGET BUILDER LICENSE
# of presets: gguf where that is the form of their weights
FORM           =
include scripts/settings.mk

# --- where things are ---

VENV    := .venv
PY       = $(or $(PYTHON),$(VENV)/bin/python)
# what has to be installed before a script runs; nothing, when an interpreter was given
HAS     := $(if $(PYTHON),,$(VENV)/locks/)
CONFIG  := build/$(NAME)/config
HF      := build/$(NAME)/hf
VARIANT := build/$(NAME)/$(or $(REFUSE),$(if $(REHEARSAL),rehearsal-)$(ENGINE)-$(TOOLCHAIN)-tp$(TP)$(if $(filter on,$(PAD_HEADS)),-padded)$(if $(filter-out 1,$(PP)),-pp$(PP))-$(or $(DTYPE),source)$(if $(QUANT),-$(QUANT)))
LOCK    := $(shell cat requirements/run.txt requirements/torch.txt | sha256sum | cut -c1-12)
# Weights that are not there are fetched first, where somebody says from where.
FETCH   := $(if $(REFUSE),,$(if $(SOURCE),$(if $(wildcard $(WEIGHTS)/.),,weights)))
# Weights are not ours: where they are, their names, sizes and times stand for their content. In the C locale and without CDPATH,
# because the environment never decides.
seen     = $(if $(REFUSE),,$(shell realpath -m --relative-base=. '$(WEIGHTS)'; CDPATH= cd -- '$(WEIGHTS)' 2>/dev/null && find -L . ../tokenizer.model \
             -maxdepth 1 -type f -not -name '.*' -printf '%p %s %T@\n' 2>/dev/null | LC_ALL=C sort))
ifeq ($(FETCH),)
  SEEN  := $(seen)
else
  SEEN   = $(seen)
endif
# packages that only some forms and sources of weights need
FORMS   := $(if $(filter gguf,$(FORM))$(wildcard $(WEIGHTS)/*.gguf),gguf.txt)
FETCHER := run.txt $(if $(filter hf: s3: gs: az:,$(firstword $(subst :,: ,$(SOURCE)))),fetch.txt)

# --- where scripts run: in the venv, or (ENGINE=tensorrt) in NVIDIA's container ---

ifneq ($(ENGINE),tensorrt)
  NEEDED  := $(if $(HAS),$(addprefix $(HAS),run.txt $(FORMS)))
  MADE_IN  = lock=$(LOCK)
  in       = $(PY)
  LISTEN   = --host $(HOST) $(PORTS) $(ENDPOINT)
  DEMO_ON  = --host $(HOST) $(PORTS)
  NVIDIA  :=
  LACKS   :=
  SERVING :=
  FETCH_PY :=
else
  include docker/container.mk
endif
PORTS   = --http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) --metrics-port $(METRICS_PORT)
ENDPOINT = --openai-port $(OPENAI_PORT) $(if $(API_KEY_FILE),--api-key-file $(API_KEY_FILE))
ADDRESS = --host $(HOST) $(PORTS)

# --- the image: what it stands on; its programs run on the host, with any Python 3 (a rehearsal's stand-ins are not for them) ---

GROUND      := build/ground-$(if $(REFUSE),refused,$(ENGINE))-$(if $(filter tensorrt,$(ENGINE)),$(TOOLCHAIN),$(TARGET))$(if $(BASE_IMAGE),-$(shell printf %s '$(subst ','\'',$(BASE_IMAGE))' | cksum | cut -d' ' -f1))
STANDS_ON    = $(or $(BASE_IMAGE),$(if $(filter tensorrt,$(ENGINE)),$(if $(NEEDED),$(file <$(NEEDED)),$(NVIDIA))))
# NVIDIA's image has the others already
IMAGE_LOCKS := image openai $(if $(filter torch,$(ENGINE)),run torch $(if $(filter cuda,$(TARGET)),torch-cuda))
REVISION     = $(shell git rev-parse HEAD 2>/dev/null)$(shell [ -z "$$(git status --porcelain 2>/dev/null | head -n 1)" ] || echo +changes)
HOST_PY      = PATH="$${PATH\#$(CURDIR)/docker/rehearsal/host:}" $(or $(wildcard $(PY)),python3)
export IMAGE KEY NODE

# --- what each room is asked to be; the room keeps it in its file `args`, written by room.py from ROOM_ARGS ---
# The question may hold a path of this machine; the answer (every other file of a room) never does.

config_ARGS     = --max-position-embeddings=$(CONTEXT)
hf_ARGS         = $(config_ARGS)
checkpoint_ARGS = --model $(if $(QUANT),$(HF),$(CONFIG)) --pad-heads $(PAD_HEADS) --tp-size $(TP) --pp-size $(PP) --dtype=$(DTYPE) --trtllm-version $(TOOLCHAIN) \
                  $(if $(QUANT),--quant $(QUANT) --examples build/TensorRT-LLM-$(TOOLCHAIN))
engines_ARGS    = --checkpoint $(VARIANT)/checkpoint --engine $(ENGINE) --trtllm-version $(TOOLCHAIN) \
                  --max-batch-size=$(MAX_BATCH_SIZE) --max-input-len=$(MAX_INPUT_LEN) --max-seq-len=$(MAX_SEQ_LEN) \
                  --max-num-tokens=$(MAX_NUM_TOKENS) $(if $(filter tensorrt,$(ENGINE)),--timing-cache build/$(if $(REHEARSAL),rehearsal-)timing-cache)
verified_ARGS   = --engines $(VARIANT)/engines --hf $(HF)
model_repo_ARGS = --engines $(VARIANT)/engines --config $(CONFIG) --trtllm-version $(TOOLCHAIN) --streaming $(STREAMING) --kv-reuse $(KV_REUSE) \
                  --name $(notdir $(patsubst %/,%,$(MODEL))) --chat-template=$(CHAT_TEMPLATE)

base_ARGS       = --builder=$(BUILDER) $(if $(filter tensorrt,$(ENGINE)),--trtllm-version $(TOOLCHAIN) $(if $(BASE_IMAGE),,--by-table))
wheels_ARGS     = --base $(GROUND)/base --target $(TARGET) $(addprefix --lock ,$(IMAGE_LOCKS))
image_ARGS      = --root $(VARIANT) --base $(GROUND)/base --wheels $(GROUND)/wheels --weights '$(WEIGHTS)' --model $(NAME) --license=$(LICENSE) \
                  --revision=$(REVISION) --builder=$(BUILDER)

# What reads the weights themselves; where they are is in SEEN, however it is spelled.
weights = $(if $(filter config hf $(if $(QUANT),,checkpoint),$1),--weights $(WEIGHTS) )
# config and hf depend on the model alone; the rooms after them also on the pinned packages, or the image, that made them. The count of files
# tells when one was taken away, which leaves no newer time behind.
asked   = $(if $(call weights,$1),$(SEEN)) $(if $(filter config hf,$1),,$(if $(filter base wheels image,$1),base=$(BASE_IMAGE),$(MADE_IN)) files=$(words $($1_CODE))) $($1_ARGS)
changed = $(if $(subst x$(file <$2/args),,x$(call asked,$1))$(subst x$(call asked,$1),,x$(file <$2/args)),FORCE)

# --- the journey ---

help: ## this page
	@awk '/^## ?/ {sub(/^## ?/, ""); print} /^[a-z_-]+:.*## / {split($$0, a, /:.*## /); printf "  %-13s %s\n", a[1], a[2]}' Makefile

doctor: ## what this machine has and lacks for the journey
	@$(call think,doctor)
plan: ## the same journey as a table: bytes, memory, commands, what fits on the GPUs; makes nothing
	@$(call think,plan)

# Both need nothing but the standard library: any Python 3 does, and only where there is none (ENGINE=tensorrt) the toolchain's.
think = set -- $(if $(JSON),--json); py=$$(type -P $(PY) python3 | head -n 1 || true); if [ "$$py" ] || [ $(ENGINE) != tensorrt ]; then exec "$${py:-python3}" -m scripts.$1 "$$@"; fi; \
        $(if $(filter-out WEIGHTS,$(REFUSED)),REFUSED_SETTINGS="$$CHOSEN" exec scripts/toolchain.sh refuse;) \
        $(if $(TOOLCHAIN),$(call in,$1) -m scripts.$1 "$$@",version=$$(scripts/toolchain.sh version '$(ASSUME_GPU)'); exec $(MAKE) $1 TOOLCHAIN="$$version")
doctor plan: export CHOSEN = $(foreach v,$(SETTINGS),$v=$($v)$(NEWLINE))INTERPRETER=$(PY)$(NEWLINE)CONFIG=$(CONFIG)$(NEWLINE)HF=$(HF)$(NEWLINE)VARIANT=$(VARIANT)
doctor plan: export REFUSED_NAMES = $(REFUSED)
doctor plan: TOOLCHAIN_IMAGE = $(NVIDIA)

# a room's own question is not theirs; scripts/fetch_weights.py has one of its own
weights: export ROOM_ARGS =
weights: export ROOM_NEEDS =
weights: | $(REFUSE) $(if $(and $(HAS),$(if $(FETCH_PY),,x)),$(addprefix $(HAS),$(FETCHER))) ## fetch them from SOURCE: resumed, checked, kept by make clean
	@$(or $(FETCH_PY),$(PY)) -m scripts.fetch_weights --source=$(SOURCE) --model $(MODEL) --output $(WEIGHTS)
config: $(CONFIG)/manifest.json ## what the model is: config.json and tokenizer in Hugging Face's form
hf: $(HF)/manifest.json ## weights -> one whole Hugging Face model; only verified and QUANT need it
checkpoint: $(VARIANT)/checkpoint/manifest.json ## weights -> a TensorRT-LLM checkpoint, one file per rank
engines: $(VARIANT)/engines/manifest.json ## -> one engine per rank
verified: $(VARIANT)/verified/manifest.json ## the engines say what Hugging Face's model says: a report
model_repo: $(VARIANT)/model_repo/manifest.json ## -> Triton's model repository, every hole filled

fsck: | $(REFUSE) $(NEEDED) ## read rooms again, byte by byte, against their manifests: make fsck [ROOM=checkpoint]
	@$(call in,fsck) -m scripts.fsck $(if $(JSON),--json) $(TO_CHECK)
TO_CHECK = $(if $(ROOM),$(or $(if $(findstring /,$(ROOM)),$(ROOM)),$(patsubst %/manifest.json,%,$(filter %/$(ROOM)/manifest.json,$(PLACES))),$(if $(filter weights,$(ROOM)),$(WEIGHTS),$(VARIANT)/$(ROOM))),\
           $(patsubst %/manifest.json,%,$(wildcard $(PLACES))) $(if $(wildcard $(WEIGHTS)/manifest.json $(WEIGHTS)/*.pth),$(WEIGHTS)))
PLACES   = $(foreach r,$(CONFIG) $(HF) $(addprefix $(VARIANT)/,checkpoint engines verified model_repo image),$r/manifest.json)

serve: model_repo | $(SERVING) $(if $(if $(REHEARSAL),,$(NVIDIA)),,$(addsuffix openai.txt,$(HAS))) ## serve it; Ctrl-C ends
	@$(if $(NVIDIA),,exec )$(call in,serve) -m scripts.serve --root $(VARIANT) $(LISTEN)

image: $(VARIANT)/image/manifest.json ## -> the serving image, in docker or buildah: make image && docker run ...
	@$(HOST_PY) -m scripts.show_image --image-room $(VARIANT)/image --builder=$(BUILDER)
size: $(VARIANT)/image/manifest.json ## every layer of the image: bytes, and why it is there
	@$(HOST_PY) -m scripts.show_image --image-room $(VARIANT)/image --root $(VARIANT) --layers $(if $(JSON),--json)
verify-image: | $(REFUSE) ## recompute what the passport of an image says: make verify-image IMAGE=name, or a file of dist/
	@$(HOST_PY) -m scripts.verify_image --builder=$(BUILDER)

ask: | $(REFUSE) $(NEEDED) ## stream an answer from the running server: make ask PROMPT="Once upon a time" MAX_TOKENS=48
	@$(call in,ask) -m scripts.ask --host $(HOST) --http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) --max-tokens $(MAX_TOKENS)

demo: model_repo | $(SERVING) ## serve, ask, stop
	@$(call in,demo) -m scripts.demo --root $(VARIANT) $(DEMO_ON) --max-tokens $(MAX_TOKENS)

release: | $(REFUSE) ## dist/: the image as an OCI archive, SBOM, provenance, checksums: make release VERSION=x.y.z [KEY=file]
	@$(HOST_PY) -m scripts.release $(RELEASE)
	@$(MAKE) image
	@$(if $(HAS),$(MAKE) $(HAS)release.txt)
	@$(PY) -m scripts.images.dist --image-room $(VARIANT)/image --base $(GROUND)/base --version $(VERSION) --builder=$(BUILDER)
RELEASE = --engine $(ENGINE) --trtllm-version $(TOOLCHAIN) --quant=$(QUANT) --version=$(VERSION) --inferred=$(INFERRED) \
          --license=$(LICENSE) --weights '$(WEIGHTS)'
chart: $(if $(VERSION),,$(VARIANT)/image/manifest.json) | $(REFUSE) ## values of docker/chart for the baked image, or for a pushed release: make chart [VERSION=x.y.z]
	@$(HOST_PY) -m scripts.chart --root $(VARIANT) --output $(VARIANT)/chart/values.yaml $(if $(VERSION),--release dist/$(NAME)-$(VERSION))
push: | $(REFUSE) ## send a release's image to a registry: make push VERSION=x.y.z IMAGE=registry.example/llama:x.y.z
	@$(HOST_PY) -m scripts.push_image --dist dist/$(NAME)-$(VERSION) --builder=$(BUILDER)

# Who reads whom.
$(VARIANT)/checkpoint/manifest.json: $(if $(QUANT),$(HF),$(CONFIG))/manifest.json
$(VARIANT)/engines/manifest.json:    $(VARIANT)/checkpoint/manifest.json
$(VARIANT)/verified/manifest.json:   $(VARIANT)/engines/manifest.json $(HF)/manifest.json
$(VARIANT)/model_repo/manifest.json: $(VARIANT)/engines/manifest.json $(CONFIG)/manifest.json $(CHAT_TEMPLATE)

$(VARIANT)/image/manifest.json:      $(addprefix $(VARIANT)/,$(addsuffix /manifest.json,engines model_repo verified)) $(GROUND)/wheels/manifest.json
$(GROUND)/wheels/manifest.json:      $(GROUND)/base/manifest.json

# Which code and tables make what (tests/test_makefile.py compares this with the scripts' imports).
forms_CODE    = scripts/room.py scripts/weights/hugging_face.py scripts/weights/shape.py scripts/weights/forms.py scripts/weights/meta.py scripts/weights/gguf.py \
                  scripts/tokenizer/byte_bpe.py scripts/weights/safetensors.py scripts/tokenizer/sentencepiece.py scripts/weights/torch_file.py
config_CODE     = scripts/build_config.py $(forms_CODE)
hf_CODE         = scripts/build_hf.py $(config_CODE)
checkpoint_CODE = scripts/build_checkpoint.py scripts/limits.py scripts/weights/split.py scripts/weights/cast.py scripts/nvidia/contracts.py $(forms_CODE) \
                  scripts/nvidia/quantize.py scripts/nvidia/trtllm_build.py scripts/nvidia/gpus.py scripts/serving/processes.py $(call tables,checkpoint-config) \
                  $(if $(QUANT),$(wildcard docker/contracts/convert/*.json docker/contracts/quantize/*.json))
engines_CODE    = scripts/build_engines.py scripts/room.py scripts/limits.py scripts/nvidia/contracts.py scripts/nvidia/gpus.py scripts/nvidia/trtllm_build.py \
                  scripts/serving/processes.py scripts/nvidia/memory.py scripts/weights/shape.py $(call tables,engine-config) \
                  $(wildcard docker/contracts/trtllm-build/*.json)
verified_CODE   = scripts/build_verified.py scripts/limits.py scripts/room.py scripts/verifying/sides.py scripts/verifying/compare.py scripts/weights/hugging_face.py scripts/weights/shape.py \
                  scripts/serving/processes.py scripts/serving/host.py scripts/serving/launch.py scripts/serving/toolbox.py scripts/weights/torch_file.py scripts/weights/safetensors.py scripts/verifying/page.py models/prompts.txt \
                  scripts/serving/checks.py scripts/nvidia/contracts.py scripts/nvidia/gpus.py scripts/verifying/trtllm_side.py $(wildcard model_repo_template/tensorrt_llm/1/*.py)
model_repo_CODE = scripts/build_model_repo.py scripts/room.py scripts/limits.py scripts/nvidia/contracts.py $(call tables,backend) docker/engines.json \
                  docker/contracts/model_config.binpb $(TEMPLATES)
base_CODE       = scripts/build_base.py scripts/room.py scripts/images/archive.py scripts/images/builders.py scripts/nvidia/contracts.py \
                  docker/toolchains.json
wheels_CODE     = scripts/build_wheels.py scripts/room.py $(patsubst %,requirements/%.txt,$(IMAGE_LOCKS)) $(wildcard requirements/openai-*.txt)
image_CODE      = scripts/build_image.py scripts/limits.py scripts/room.py scripts/build_base.py scripts/nvidia/contracts.py scripts/images/archive.py scripts/images/builders.py \
                  scripts/images/passport.py scripts/release.py docker/Dockerfile LICENSE docker/toolchains.json docker/gpus.json \
                  $(addprefix scripts/,serve.py images/entry.py nvidia/gpus.py) $(filter-out %/__init__.py,$(wildcard scripts/serving/*.py)) \
                  $(wildcard scripts/__init__.py $(addsuffix /__init__.py,$(addprefix scripts/,images nvidia serving)) scripts/reports/*.py) \
                  $(wildcard scripts/openai/*.py scripts/openai/vendored/*.js scripts/openai/vendored/*.txt) scripts/openai/page.html
tables          = docker/toolchains.json $(wildcard docker/contracts/$1/*.json)
TEMPLATES       = $(wildcard model_repo_template/*/config.pbtxt model_repo_template/*/1/*.py)

# How any room is filled. room.py asks make's own question again when it has the lock: another make may have answered it.
needs = $(if $(findstring B,$(firstword -$(MAKEFLAGS))),,$(filter-out FORCE,$^))
$(CONFIG)/manifest.json $(HF)/manifest.json $(VARIANT)/%/manifest.json: export ROOM_NEEDS = $(needs)
$(CONFIG)/manifest.json: export ROOM_ARGS = $(call asked,config)
$(HF)/manifest.json: export ROOM_ARGS = $(call asked,hf)
$(VARIANT)/%/manifest.json: export ROOM_ARGS = $(call asked,$*)
$(CONFIG)/manifest.json $(HF)/manifest.json: build/$(NAME)/%/manifest.json: $$($$*_CODE) $$(call changed,$$*,$$(@D)) | $(REFUSE) $(FETCH) $(NEEDED)
	@$(call in,$*) -m scripts.build_$* $(call weights,$*)$($*_ARGS) --output $(@D)
$(VARIANT)/%/manifest.json: $$($$*_CODE) $$(call changed,$$*,$$(@D)) | $(NEEDED)
	@$(call in,$*) -m scripts.build_$* $(call weights,$*)$($*_ARGS) --output $(@D)
$(VARIANT)/verified/manifest.json: | $(if $(filter tensorrt,$(ENGINE)),,$(addsuffix verify.txt,$(HAS)))

# What the image stands on is made once for all models: the base, and the packages for its Python.
$(GROUND)/%/manifest.json: export ROOM_NEEDS = $(needs)
$(GROUND)/base/manifest.json: export ROOM_ARGS = $(call asked,base)
$(GROUND)/wheels/manifest.json: export ROOM_ARGS = $(call asked,wheels)
$(VARIANT)/image/manifest.json: export ROOM_ARGS = $(call asked,image)
$(GROUND)/%/manifest.json: export BASE = $(STANDS_ON)
$(GROUND)/base/manifest.json: $(base_CODE) $$(call changed,base,$$(@D)) | $(REFUSE) $(if $(BASE_IMAGE),,$(filter %.iid,$(NEEDED)))
	@$(HOST_PY) -m scripts.build_base $(base_ARGS) --output $(@D)
$(GROUND)/wheels/manifest.json: $(wheels_CODE) $$(call changed,wheels,$$(@D)) | $(REFUSE) $(if $(NVIDIA),$(NEEDED),$(addsuffix run.txt,$(HAS)))
	@$(call in,wheels) -m scripts.build_wheels $(wheels_ARGS) --output $(@D)
$(VARIANT)/image/manifest.json: $(image_CODE) $$(call changed,image,$$(@D)) | $(REFUSE)
	@$(HOST_PY) -m scripts.build_image $(image_ARGS) --no-cache=$(NO_CACHE) --output $(@D)

refuse: export REFUSED_SETTINGS = $(foreach v,$(SETTINGS),$v=$($v)$(NEWLINE))
refuse: export REFUSED_NAMES = $(REFUSED)
refuse:
	@py=$$(type -P $(VENV)/bin/python python3 | head -n 1 || true); if [ "$$py" ]; then "$$py" -m scripts.settings; else scripts/toolchain.sh refuse; fi

# --- the packages, pinned by hash (README, "Development") ---

$(VENV)/locks/run.txt: requirements/torch.txt requirements/torch-cuda.txt scripts/make_venv.sh $(if $(realpath $(VENV)/bin/python),,FORCE)
$(addprefix $(VENV)/locks/,bench.txt perf.txt aiperf.txt release.txt gguf.txt fetch.txt verify.txt openai.txt chart.txt test.txt dev.txt): $(VENV)/locks/run.txt
# a room's own question is not theirs
$(VENV)/locks/%.txt: export ROOM_ARGS =
$(VENV)/locks/%.txt: export ROOM_NEEDS =
$(VENV)/locks/%.txt: requirements/%.txt | $(REFUSE)
	@scripts/make_venv.sh $(VENV) $*

##
## Development:

test: $(addprefix $(HAS),$(if $(HAS),run.txt verify.txt gguf.txt fetch.txt openai.txt bench.txt aiperf.txt chart.txt test.txt release.txt)) ## every test that this machine can run
	@$(PY) -m pytest -q --durations=25 $(or $(TESTS),-n 2 --dist loadgroup --ignore tests/images/docker)
test-image: $(addprefix $(HAS),$(if $(HAS),run.txt verify.txt gguf.txt fetch.txt openai.txt chart.txt test.txt release.txt)) ## the tests of the image: they need docker, buildah, mmdebstrap and root
	@$(PY) -m pytest -q --durations=25 $(or $(TESTS),tests/images/docker)
test-long: $(addprefix $(HAS),$(if $(HAS),run.txt verify.txt gguf.txt fetch.txt openai.txt bench.txt aiperf.txt chart.txt test.txt release.txt)) ## property tests and fuzzers, fifty times as long (about half an hour)
	@$(PY) -m pytest -q --hypothesis-profile=long --timeout 3600 $(or $(TESTS),tests/text_models/test_text.py tests/tokenizer/test_tokenizer.py tests/openai/test_chat_template.py tests/openai/test_fuzz.py tests/text_models/test_fuzz_triton.py)
pin: ## write the digests of NVIDIA's images into docker/toolchains.json; needs docker and network
	@scripts/toolchain.sh pin
lint: $(addprefix $(HAS),$(if $(HAS),run.txt openai.txt test.txt dev.txt)) ## ruff, mypy, shellcheck, mbake, hadolint
	@$(PY) -m ruff check . && $(PY) -m ruff format --check --diff scripts tests && $(PY) -m mypy
	@$(dir $(PY))shellcheck scripts/*.sh scripts/openai/vendored/*.sh .ci/run && $(dir $(PY))mbake validate Makefile \
	  && $(dir $(PY))hadolint docker/Dockerfile docker/serving.Dockerfile
lock-base: $(GROUND)/base/manifest.json ## pin the Debian packages of the image's base as they are now, in docker/base.txt
	@cp $(GROUND)/base/packages.txt docker/base.txt && echo "lock-base   docker/base.txt: $$(wc -l <docker/base.txt) packages"
lock: $(addsuffix dev.txt,$(HAS)) ## write the lock files anew from requirements/*.in
	@scripts/lock.sh $(PY)
synthetic: | $(addsuffix run.txt,$(HAS)) ## write weights/synthetic-7b: Llama-2-7B's shape, random weights, for measuring speed
	@$(PY) -m scripts.synthetic --output weights/synthetic-7b
bench: model_repo $(if $(PEERS),$(if $(wildcard $(WEIGHTS)/config.json),,hf)) | $(addprefix $(HAS),$(if $(HAS),bench.txt openai.txt aiperf.txt)) $(if $(PEERS),$(addsuffix verify.txt,$(HAS))) $(if $(and $(HAS),$(filter bench,$(MAKECMDGOALS))),$(shell printf '%s\n' 'glibc 2.38' "$$(getconf GNU_LIBC_VERSION)" | sort -VC && echo $(HAS)perf.txt)) ## the served model under load, and the engine alone, against this host's ceilings: JSON, CSV, a page
	@$(PY) -m scripts.bench.load --root $(VARIANT) $(ADDRESS) --openai-port $(OPENAI_PORT) --tokenizer $(CONFIG) --hf $(if $(wildcard $(WEIGHTS)/config.json),$(WEIGHTS),$(HF)) \
	  --name $(NAME) --out build/bench/$(NAME)-tp$(TP) \
	  --points="$(POINTS)" $(if $(BASELINE),--baseline $(BASELINE)) $(if $(WITH),--with $(WITH)) $(if $(PEERS),--peers) $(BENCH)
bench-serve: model_repo ## time to ready, 8 streams against one: ratios from one run
	@$(PY) -m scripts.bench.serve --root $(VARIANT) $(ADDRESS)
bench-text: model_repo | $(addsuffix verify.txt,$(HAS)) ## text in and out against NVIDIA's stock models: ratios from one run
	@$(PY) -m scripts.bench.text --root $(VARIANT) $(BENCH)
bench-openai: model_repo | $(addsuffix openai.txt,$(HAS)) ## the OpenAI-compatible endpoint against gRPC: tokens a second, CPU a token
	@$(PY) -m scripts.bench.openai --root $(VARIANT) $(ADDRESS) $(ENDPOINT)
bench-convert: $(addsuffix run.txt,$(HAS)) ## conversion against cp and sync: ratios from one run
	@$(PY) -m scripts.bench.convert $(BENCH)
clean: ## remove every room; fetched weights stay
	rm -rf build/*

.PHONY: help doctor plan hf checkpoint engines verified model_repo serve ask demo image size verify-image release chart push test test-image test-long pin lint lock lock-base synthetic bench bench-serve bench-text bench-openai bench-convert clean refuse FORCE weights config fsck
