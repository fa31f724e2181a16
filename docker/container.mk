# How a script runs with ENGINE=tensorrt: inside NVIDIA's container.
# Included by the Makefile; what is used there: NEEDED, SERVING, MADE_IN, LISTEN, DEMO_ON, NVIDIA and $(call in,ROOM), the words in front of `-m`.

# plan and doctor want it also where the weights are not here yet
NVIDIA  := $(if $(filter-out $(if $(filter plan doctor,$(MAKECMDGOALS)),WEIGHTS),$(REFUSED)),,$(if $(TOOLCHAIN),$(shell scripts/toolchain.sh image $(TOOLCHAIN))))
# packages that NVIDIA's image lacks, if any: it is completed with them once, and the completed one is used
LACKS   := $(if $(NVIDIA),$(addprefix requirements/,$(shell scripts/toolchain.sh cell $(TOOLCHAIN) packages)))
NEEDED  := $(if $(LACKS),build/toolchain-$(TOOLCHAIN)$(if $(REHEARSAL),-rehearsal).iid)
# serve and demo need packages that no image of NVIDIA's has; rooms do not, and `make image` brings them itself
SERVING := $(if $(NVIDIA),build/serving-$(TOOLCHAIN)$(if $(REHEARSAL),-rehearsal).iid)
TOOLCHAIN_IMAGE    = $(if $(NEEDED),"$$(cat $(NEEDED))",$(NVIDIA))
MADE_IN  = image=$(NVIDIA)$(if $(LACKS),+$(shell sha256sum <$(LACKS) | cut -c1-12))
# Every path is the same inside and outside. A room has no network. NVIDIA's entrypoint only prints a banner and checks what we check.
run_in   = $(if $(filter serve demo,$1),"$$(cat $(SERVING))",$(TOOLCHAIN_IMAGE))
in       = scripts/toolchain.sh check $(call run_in,$1)$(if $(filter $1,$(GPU_JOBS)), gpu) $(BREAK)$(if $(filter serve,$1),&& $(FREE) $(BREAK)&& exec,&&) \
           docker run --rm --init --pull never --entrypoint '' --user "$$(id -u):$$(id -g)" $(BREAK)--workdir '$(CURDIR)' --volume '$(CURDIR):$(CURDIR)' \
           $(shell scripts/toolchain.sh mounts '$(WEIGHTS)') $(BREAK)$(ENVIRONMENT) $(BREAK)$($(or $(filter serve ask wheels $(if $(filter-out int8_wo,$(QUANT)),checkpoint),$1),room)_NETWORK) \
           $(if $(filter $1,$(GPU_JOBS)),$(BREAK)$(GPUS)) $(BREAK)$(call run_in,$1) $(BREAK)python3
# What fetches weights here needs no .venv: any python3 from 3.8 on that has urllib3, unless the source needs more (requirements/fetch.txt).
FETCH_PY := $(if $(filter-out run.txt,$(FETCHER)),,$(if $(FETCH)$(filter weights,$(MAKECMDGOALS)),$(shell [ ! -x '$(PY)' ] && \
            python3 -c 'import sys, urllib3; sys.exit(sys.version_info < (3, 8))' 2>/dev/null && echo python3)))
BREAK   := \$(NOTHING)$(NEWLINE)    $(NOTHING)
ENVIRONMENT   = --env HOME=/tmp --env USER=bake --env PYTHONDONTWRITEBYTECODE=1 --env ROOM_ARGS --env ROOM_NEEDS --env BAKE_SETTINGS --env PROMPT \
                --env CHOSEN --env REFUSED_NAMES --env BAKE_API_KEY
GPU_JOBS      = engines verified serve demo $(if $(QUANT),checkpoint) $(if $(ASSUME_GPU),,doctor plan)
# as NVIDIA starts it (README of tensorrtllm_backend); shared memory: 1 GB for each of 8 ranks, a limit of which only what is used is taken
GPUS          = --gpus all --shm-size 8g --ulimit memlock=-1 --ulimit stack=67108864:1073741824
room_NETWORK  = --network none
# texts to measure activations on, which NVIDIA's tools fetch (scripts/nvidia/quantize.py)
checkpoint_NETWORK =
# the image's packages, fetched by hash
wheels_NETWORK =
ask_NETWORK   = --network host
serve_NETWORK = $(foreach p,$(HTTP_PORT) $(GRPC_PORT) $(METRICS_PORT) $(OPENAI_PORT),--publish $(if $(findstring :,$(HOST)),[$(HOST)],$(HOST)):$p:$p)
FREE          = scripts/toolchain.sh free $(HOST) $(HTTP_PORT) $(GRPC_PORT) $(METRICS_PORT) $(OPENAI_PORT)
LISTEN        = --host 0.0.0.0 --shown-host $(HOST) $(PORTS) $(ENDPOINT)
DEMO_ON       = --host 127.0.0.1 $(PORTS)

# NVIDIA's image, completed where it lacks the Python wheel. --iidfile writes last, so the file is there when the image is.
build/toolchain-%.iid build/serving-%.iid: export ROOM_ARGS =
build/toolchain-%.iid build/serving-%.iid: export ROOM_NEEDS =
build/toolchain-%.iid: docker/Dockerfile docker/toolchains.json $(LACKS)
	@mkdir -p $(@D) && scripts/toolchain.sh check $(NVIDIA)
	@docker build --file docker/Dockerfile --target toolchain --build-arg BASE=$(NVIDIA) --build-arg PACKAGES=$(notdir $(LACKS)) \
	  --tag trtllm-bake-toolchain:$* --iidfile $@ requirements
# The same, completed with what serving needs. (By name, because BuildKit's FROM takes no id.)
build/serving-%.iid: docker/serving.Dockerfile $(NEEDED) docker/toolchains.json $(wildcard requirements/openai*.txt)
	@mkdir -p $(@D) && scripts/toolchain.sh check $(TOOLCHAIN_IMAGE)
	@docker build --file docker/serving.Dockerfile --target serving --build-arg BASE=$(if $(NEEDED),trtllm-bake-toolchain:$*,$(NVIDIA)) \
	  --iidfile $@ requirements
