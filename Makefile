# trtllm-bake: a Llama 2 from Meta's weights to a serving Triton, one room after another.
# A room is a directory under build/; its manifest.json is written last and is what make looks at (docs/design.md,
# "Rooms"). This file says who reads whom and how a room is filled. What is decided (settings, presets, where
# rooms lie, their questions, which container) is Python: scripts/settings.py and scripts/making, which is asked once
# below.

## trtllm-bake: Meta's Llama 2 weights -> TensorRT-LLM checkpoint -> engines -> Triton, one room after another.
##
##   make demo                     the bundled model, served by two ranks, asked, stopped
##   make serve MODEL=llama-2-7b   a preset of models/, or MODEL=/path/to/a/folder; stays until Ctrl-C
##

# n or q for make -n or make -q, which answer without writing; B: make everything again
OPTIONS := $(filter-out --%,$(firstword -$(MAKEFLAGS)))
MAKEFLAGS += --no-builtin-rules --warn-undefined-variables --no-print-directory
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.SECONDEXPANSION:
.DEFAULT_GOAL := help
# these would mix other packages into PYTHON or .venv, or one room's list of ingredients into another one's
unexport PYTHONHOME PYTHONPATH PYTHONSAFEPATH ROOM_USED

VENV    := .venv
ROOMS   := config hf checkpoint engines verified model_repo
WORDS   := help doctor plan weights $(ROOMS) fsck serve image size verify-image ask demo release chart push clean \
           test test-versions test-clients test-load test-image test-long pin lint lock-base lock synthetic bench \
           bench-serve bench-text bench-openai bench-convert soak
.PHONY: $(WORDS) FORCE

help: ## this page
	@awk '/^## ?/ {sub(/^## ?/, ""); print} \
	  /^[a-z_-]+:.*## / {split($$0, a, /:.*## /); printf "  %-13s %s\n", a[1], a[2]}' Makefile
	@echo && echo 'Settings (default), as make NAME=value:' && echo
	@awk '/^\| `[A-Z]/ {gsub(/`/, ""); split($$0, a, / *\| */); \
	  printf "  %-14s %s%s\n", a[2], a[4], a[3] ? " (" a[3] ")" : ""}' docs/settings.md

# --- what was typed, and what follows from it. `make help` and `make clean` need make alone. ---

GOALS   := $(or $(MAKECMDGOALS),help)
# the user's values are taken literally: a $ is a $, not a variable
TYPED   := $(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $v)),$v))
define NEWLINE


endef
quoted   = '$(subst ','\'',$(subst $(NEWLINE), ,$1))'
DECIDE   = PATH="$$PATH:.venv/bin" python3 -ESB -m scripts.making \
           $(if $(findstring n,$(OPTIONS))$(findstring q,$(OPTIONS)),--asked) \
           $(if $(filter-out 0,$(MAKELEVEL)),--below) '$(WORDS)' $(call quoted,$(GOALS)) \
           $(foreach v,$(TYPED),$(call quoted,$v=$(value $v)))
define NO_PYTHON
no answer from python3, which decides what make does


-- NO PYTHON -------------------------------------------------------------------------------- python3

This machine has no python3 of 3.8 or later on its PATH, or the error above kept it from answering.

Install one, for instance:

    sudo apt-get install python3

endef
ifneq ($(filter-out help clean,$(GOALS)),)
$(eval $(subst {newline},$(NEWLINE),$(or $(shell $(DECIDE)),$(error $(NO_PYTHON)))))

# free text reaches the scripts through the environment: no quoting can break it
export PROMPT IMAGE KEY NODE
HOST_PY  = PATH="$${PATH\#$(CURDIR)/docker/rehearsal/host:}" $(or $(wildcard $(PY)),python3)
NOTHING :=
BREAK   := \$(NOTHING)$(NEWLINE)    $(NOTHING)

# --- who reads whom ---

$(VARIANT)/checkpoint/manifest.json: $(if $(QUANT),$(HF),$(CONFIG))/manifest.json
$(VARIANT)/engines/manifest.json:    $(VARIANT)/checkpoint/manifest.json
$(VARIANT)/verified/manifest.json:   $(VARIANT)/engines/manifest.json $(HF)/manifest.json
$(VARIANT)/model_repo/manifest.json: $(VARIANT)/engines/manifest.json $(CONFIG)/manifest.json $(CHAT_TEMPLATE)
$(VARIANT)/image/manifest.json:      $(addprefix $(VARIANT)/,$(addsuffix /manifest.json,engines model_repo verified)) \
                                     $(GROUND)/wheels/manifest.json
$(GROUND)/wheels/manifest.json:      $(GROUND)/base/manifest.json

# --- how a room is filled ---

# The option of rooms that read the weights themselves. SEEN has the weights' place, however it is spelled.
weights = $(if $(filter $(READ_WEIGHTS),$1),--weights $(WEIGHTS) )
# What a room is asked to be: its file `args`, written by room.py from ROOM_ARGS. config and hf depend on the model
# alone, the rooms after them also on the pinned packages, or the image, that made them.
asked   = $(if $(call weights,$1),$(SEEN)) $(if $(filter-out config hf,$1),$(MADE_IN)) $($1_ARGS)
# STALE: rooms whose record names a module or a table that has changed since (scripts/making/ingredients.py).
differs = $(subst x$1,,x$2)$(subst x$2,,x$1)
changed = $(if $(filter $1,$(STALE))$(call differs,$(file <$2/args),$(call asked,$1)),FORCE)
# room.py asks make's question again once it has the lock, because another make may have made the room meanwhile.
needs   = $(if $(findstring B,$(OPTIONS)),,$(or $(filter-out FORCE,$^),none))

build/%/manifest.json: export ROOM_NEEDS = $(needs)
build/%/manifest.json: export ROOM_ARGS = $(call asked,$(notdir $(@D)))
$(CONFIG)/manifest.json $(HF)/manifest.json: build/$(NAME)/%/manifest.json: \
    $$(call changed,$$*,$$(@D)) | $(FETCH) $(NEEDED) $(if $(NVIDIA),,$(ENDPOINT_NEEDS))
	@$(in_$*) -m scripts.build_$* $(call weights,$*)$($*_ARGS) --output $(@D)
$(VARIANT)/%/manifest.json: $$(call changed,$$*,$$(@D)) | $(NEEDED)
	@$(in_$*) -m scripts.build_$* $(call weights,$*)$($*_ARGS) --output $(@D)
$(VARIANT)/verified/manifest.json: | $(if $(NVIDIA),,$(addsuffix verify.txt,$(HAS)))

# The image's rooms are filled on the host. The base of an image and its packages are made once for all models.
$(GROUND)/%/manifest.json: export BASE := $(BASE)
$(GROUND)/base/manifest.json: $$(call changed,base,$$(@D)) | $(if $(BASE_IMAGE),,$(filter %.iid,$(NEEDED)))
	@$(HOST_PY) -m scripts.build_base $(base_ARGS) --output $(@D)
$(GROUND)/wheels/manifest.json: $$(call changed,wheels,$$(@D)) | $(if $(NVIDIA),$(NEEDED),$(addsuffix run.txt,$(HAS)))
	@$(in_wheels) -m scripts.build_wheels $(wheels_ARGS) --output $(@D)
$(VARIANT)/image/manifest.json: $$(call changed,image,$$(@D))
	@$(HOST_PY) -m scripts.build_image $(image_ARGS) --no-cache=$(NO_CACHE) --output $(@D)

# NVIDIA's image, completed if it lacks the Python wheel. --iidfile writes last, so the file is there when the image
# is.
build/toolchain-%.iid: docker/Dockerfile docker/toolchains.json $(LACKS)
	@mkdir -p $(@D) && scripts/toolchain.sh check $(NVIDIA)
	@docker build --file docker/Dockerfile --target toolchain --build-arg BASE=$(NVIDIA) \
	  --build-arg PACKAGES=$(notdir $(LACKS)) --tag trtllm-bake-toolchain:$* --iidfile $@ requirements
# The same, with the packages that serving needs. (By name, because BuildKit's FROM takes no id.)
build/serving-%.iid: docker/serving.Dockerfile $(NEEDED) docker/toolchains.json $(wildcard requirements/openai*.txt)
	@mkdir -p $(@D) && scripts/toolchain.sh check $(if $(NEEDED),"$$(cat $(NEEDED))",$(NVIDIA))
	@docker build --file docker/serving.Dockerfile --target serving \
	  --build-arg BASE=$(if $(NEEDED),trtllm-bake-toolchain:$*,$(NVIDIA)) --iidfile $@ requirements

# --- the journey ---

# a room's question does not hold for the things that it needs
weights: export ROOM_ARGS =
weights: export ROOM_NEEDS =
$(VENV)/locks/%.txt build/toolchain-%.iid build/serving-%.iid: export ROOM_ARGS =
$(VENV)/locks/%.txt build/toolchain-%.iid build/serving-%.iid: export ROOM_NEEDS =
doctor plan: export REFUSED_NAMES = $(REFUSED)

doctor: ## what this machine has and lacks for the journey
	@exec $(THINKS) -m scripts.doctor $(if $(JSON),--json)
plan: ## the same journey as a table: bytes, memory, commands, what fits on the GPUs; makes nothing
	@exec $(THINKS) -m scripts.plan $(if $(JSON),--json)
weights: | $(FETCHING_NEEDS) ## fetch the weights from SOURCE: resumed, checked, kept by make clean
	@$(FETCH_PY) -m scripts.fetch_weights --source=$(SOURCE) --model $(MODEL) --output $(WEIGHTS)
config: $(CONFIG)/manifest.json ## a description of the model: config.json and tokenizer in Hugging Face's form
hf: $(HF)/manifest.json ## weights -> one whole Hugging Face model; only verified and QUANT need it
checkpoint: $(VARIANT)/checkpoint/manifest.json ## weights -> a TensorRT-LLM checkpoint, one file per rank
engines: $(VARIANT)/engines/manifest.json ## -> one engine per rank
verified: $(VARIANT)/verified/manifest.json ## check that the engines give the answers of Hugging Face's model: a report
model_repo: $(VARIANT)/model_repo/manifest.json ## -> Triton's model repository, every hole filled
fsck: | $(NEEDED) ## read rooms again and compare every byte with the manifests: make fsck [ROOM=checkpoint]
	@$(in_fsck) -m scripts.fsck $(if $(JSON),--json) $(TO_CHECK)
serve: model_repo | $(SERVING) $(ENDPOINT_NEEDS) ## serve it; Ctrl-C ends
	@$(in_serve) -m scripts.serve --root $(VARIANT) $(LISTEN)
image: $(VARIANT)/image/manifest.json ## -> the serving image, in docker or buildah: make image && docker run ...
	@$(HOST_PY) -m scripts.show_image --image-room $(VARIANT)/image --builder=$(BUILDER)
size: $(VARIANT)/image/manifest.json ## every layer of the image: bytes, and why it is there
	@$(HOST_PY) -m scripts.show_image --image-room $(VARIANT)/image --root $(VARIANT) --layers $(if $(JSON),--json)
verify-image: ## recompute what the passport of an image says: make verify-image IMAGE=name, or a file of dist/
	@$(HOST_PY) -m scripts.verify_image --builder=$(BUILDER)
ask: | $(NEEDED) ## stream an answer from the running server: make ask PROMPT="Once upon a time" MAX_TOKENS=48
	@$(in_ask) -m scripts.ask --host $(HOST) --http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) \
	  --max-tokens $(MAX_TOKENS)
demo: model_repo | $(SERVING) ## serve, ask, stop
	@$(in_demo) -m scripts.demo --root $(VARIANT) $(DEMO_ON) --max-tokens $(MAX_TOKENS)
release: ## dist/: the image as an OCI archive, SBOM, provenance, checksums: make release VERSION=x.y.z [KEY=file]
	@$(HOST_PY) -m scripts.release --engine $(ENGINE) --trtllm-version $(TOOLCHAIN) --quant=$(QUANT) \
	  --version=$(VERSION) --inferred=$(INFERRED) --license=$(LICENSE) --weights '$(WEIGHTS)'
	@$(MAKE) image
	@$(if $(HAS),$(MAKE) $(HAS)release.txt)
	@$(PY) -m scripts.images.dist --image-room $(VARIANT)/image --base $(GROUND)/base --version $(VERSION) \
	  --builder=$(BUILDER)
chart: $(if $(VERSION),,$(VARIANT)/image/manifest.json) ## values of docker/chart for the image [VERSION=x.y.z]
	@$(HOST_PY) -m scripts.chart --root $(VARIANT) --output $(VARIANT)/chart/values.yaml \
	  $(if $(VERSION),--release dist/$(NAME)-$(VERSION))
push: ## send a release's image to a registry: make push VERSION=x.y.z IMAGE=registry.example/llama:x.y.z
	@$(HOST_PY) -m scripts.push_image --dist dist/$(NAME)-$(VERSION) --builder=$(BUILDER)

# --- the packages, pinned by hash (CONTRIBUTING.md) ---

has   = $(if $(HAS),$(addprefix $(HAS),$(addsuffix .txt,$1)))
$(VENV)/locks/run.txt: requirements/torch.txt requirements/torch-cuda.txt scripts/make_venv.sh \
                       $(if $(realpath $(VENV)/bin/python),,FORCE)
$(call has,perf aiperf clients release gguf fetch verify openai chart test dev): $(VENV)/locks/run.txt
$(VENV)/locks/%.txt: requirements/%.txt
	@scripts/make_venv.sh $(VENV) $*

##
## Development:

TESTED := $(call has,run verify gguf fetch openai aiperf clients chart test release)
BENCH_NEEDS := $(call has,openai aiperf $(if $(PEERS),verify)) $(PERF)
FUZZ   := tests/openai/test_fuzz.py tests/text_models/test_fuzz_triton.py
VERSIONS := tests/test_rehearsed_server.py tests/text_models/test_clients.py
CLIENTS := tests/openai/test_clients.py tests/openai/test_page.py
LOADS  := $(FUZZ) tests/bench/test_make_bench.py tests/bench/test_text.py
LONG   := $(FUZZ) tests/text_models/test_text.py tests/tokenizer/test_tokenizer.py tests/openai/test_chat_template.py
PYTEST  = $(PY) -m pytest -q --durations=25
SPREAD := -n 3 --dist loadgroup --no-loadscope-reorder
test: $(TESTED) ## every test that this machine can run, except those of the targets test-...
	@$(PYTEST) $(or $(TESTS),$(SPREAD) $(addprefix --ignore ,tests/images/docker $(VERSIONS) $(CLIENTS) $(LOADS)))
test-versions: $(TESTED) ## the servers of every TOOLCHAIN, rehearsed, and NVIDIA's clients of every version
	@$(PYTEST) $(or $(TESTS),$(SPREAD) $(VERSIONS))
test-clients: $(TESTED) ## packages of OpenAI's clients, and the endpoint's page in a browser
	@$(PYTEST) $(or $(TESTS),$(SPREAD) $(CLIENTS))
test-load: $(TESTED) ## random requests, and the load generators of make bench, against real servers
	@$(PYTEST) $(or $(TESTS),$(SPREAD) $(LOADS))
test-image: $(TESTED) ## the tests of the image: they need docker, buildah, mmdebstrap and root
	@$(PYTEST) $(or $(TESTS),tests/images/docker)
test-long: $(TESTED) ## property tests and fuzzers, fifty times as long (about half an hour)
	@$(PYTEST) --hypothesis-profile=long --timeout 3600 $(or $(TESTS),$(LONG))
pin: ## write the digests of NVIDIA's images into docker/toolchains.json; needs docker and network
	@scripts/toolchain.sh pin
lint: $(call has,run openai test dev) ## ruff, mypy, import-linter, shellcheck, mbake, hadolint, and the prose
	@$(PY) -m scripts.words
	@$(PY) -m ruff check . && $(PY) -m ruff format --check --diff scripts tests model_repo_template
	@$(PY) -m mypy && for folder in model_repo_template/*/1; do $(PY) -m mypy $$folder/*.py; done
	@$(dir $(PY))lint-imports --no-logo
	@$(dir $(PY))shellcheck scripts/*.sh scripts/openai/vendored/*.sh .ci/run && $(dir $(PY))mbake validate Makefile \
	  && $(dir $(PY))hadolint docker/Dockerfile docker/serving.Dockerfile
lock-base: $(GROUND)/base/manifest.json ## pin the Debian packages of the image's base, in docker/base.txt
	@cp $(GROUND)/base/packages.txt docker/base.txt
	@echo "lock-base   docker/base.txt: $$(wc -l <docker/base.txt) packages"
lock: $(call has,dev) ## write the lock files again from requirements/*.in
	@scripts/lock.sh $(PY)
synthetic: | $(call has,run) ## write weights/synthetic-7b (MODEL=synthetic-13b, -70b): Llama 2's shape, random weights
	@$(PY) -m scripts.synthetic --output weights/$(or $(filter synthetic-%,$(MODEL)),synthetic-7b)
bench: model_repo $(if $(PEERS),$(HF_ROOM)) | $(BENCH_NEEDS) ## the served model under load, and the engine alone
	@$(PY) -m scripts.bench.load --root $(VARIANT) $(ADDRESS) --openai-port $(OPENAI_PORT) --tokenizer $(CONFIG) \
	  --hf $(HF_FOLDER) --name $(NAME) --out build/bench/$(NAME)-tp$(TP) --points="$(POINTS)" \
	  $(if $(BASELINE),--baseline $(BASELINE)) $(if $(WITH),--with $(WITH)) $(if $(PEERS),--peers) \
	  $(if $(VLLM_PYTHON),--vllm-python $(VLLM_PYTHON)) $(BENCH)
bench-serve: model_repo ## time to ready, 8 streams against one: ratios from one run
	@$(PY) -m scripts.bench.serve --root $(VARIANT) $(ADDRESS)
bench-text: model_repo | $(call has,verify) ## text in and out against NVIDIA's stock models: ratios from one run
	@$(PY) -m scripts.bench.text --root $(VARIANT) $(BENCH)
bench-openai: model_repo | $(call has,openai) ## the OpenAI-compatible endpoint against gRPC: tokens per second, CPU
	@$(PY) -m scripts.bench.openai --root $(VARIANT) $(ADDRESS) $(ENDPOINT) $(BENCH)
soak: model_repo | $(call has,openai) ## hostile and honest clients for half an hour; every answer is checked
	@$(PY) -m scripts.bench.soak --root $(VARIANT) $(ADDRESS) $(ENDPOINT) \
	  $(if $(SECONDS),--seconds $(SECONDS)) $(if $(JSON),--json)
bench-convert: $(call has,run) ## conversion against cp and sync: ratios from one run
	@$(PY) -m scripts.bench.convert $(BENCH)

endif
clean: ## remove every room; fetched weights stay
	rm -rf build/*
