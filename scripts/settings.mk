# What the settings come to: what was typed, what is refused, which model and which TensorRT-LLM. Included by the Makefile.
# Defines BAKE_SETTINGS, NEWLINE, REFUSED and REFUSE (scripts/settings.py tells the user why), NAME, TOOLCHAIN.

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
override IMAGE := $(value IMAGE)
override KEY := $(value KEY)
override NODE := $(value NODE)
# these would mix other packages into PYTHON or .venv
unexport PYTHONHOME PYTHONPATH PYTHONSAFEPATH

# REFUSED names the settings that cannot be right; scripts/settings.py tells the user why. First what would break this makefile.
NOTHING     :=
HASH        := \#
NOT_A_WORD   = $$ $(HASH) % ; ' " ` & | < > ( ) [ ] { } * ? ! ~ \$(NOTHING)
REFUSED     := $(foreach v,$(SETTINGS),$(if $(strip $(foreach c,$(NOT_A_WORD) $(if $(filter HOST SOURCE,$v),,:),$(findstring $c,$($v))) \
                 $(if $(filter ASSUME_GPU REHEARSAL,$v),,$(filter-out 0 1,$(words $($v))))),$v))
# a URL with a password in it
REFUSED     += $(if $(filter http://% https://%,$(SOURCE)),$(if $(findstring @,$(word 2,$(subst /, ,$(SOURCE)))),$(filter-out $(REFUSED),SOURCE)))
# a name that is no setting: a slip of the finger must not serve another model (a make above ours may have names of its own)
REFUSED     += $(if $(filter 0,$(MAKELEVEL)),$(filter-out $(SETTINGS) PROMPT TESTS BENCH POINTS BASELINE WITH PEERS ROOM JSON VERSION INFERRED BASE_IMAGE NO_CACHE IMAGE KEY NODE,$(TYPED)))

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

# A rehearsal sees stand-ins first on its PATH, keeps its rooms apart, and says so in every line.
ifneq ($(REHEARSAL),)
  REFUSED += $(if $(and $(filter tensorrt,$(ENGINE)),$(findstring x ,$(REHEARSAL))),,REHEARSAL)
  export PATH := $(CURDIR)/docker/rehearsal/host:$(PATH)
  export REHEARSAL_PYTHON = $(abspath $(PY))
  export REHEARSAL_GPUS := $(REHEARSAL)
  export REHEARSAL_TRTLLM = $(TOOLCHAIN)
endif

# Which TensorRT-LLM, where nobody said so. build/gpu.mk keeps what the GPUs decided; it is made when it is needed and they changed.
NO_TOOLCHAIN := help doctor plan test test-long lint lock pin clean refuse
ifeq ($(ENGINE)$(TOOLCHAIN),tensorrt)
  ifneq ($(if $(strip $(REFUSED)),,$(filter-out $(NO_TOOLCHAIN),$(or $(MAKECMDGOALS),help))),)
    ifneq ($(ASKED),)
      TOOLCHAIN := $(or $(shell BAKE_SETTINGS='$(subst $(NEWLINE),|,$(BAKE_SETTINGS))' scripts/toolchain.sh version '$(or $(ASSUME_GPU),$(REHEARSAL))'),$(error which TensorRT-LLM is not known))
    else ifeq ($(ASSUME_GPU),)
      GPU_SEEN =
      export GPU_SEEN_NOW := $(shell { printf %s '$(REHEARSAL)'; cat /proc/driver/nvidia/gpus/*/information 2>/dev/null; } | cksum)
      include build/gpu.mk
      build/gpu.mk: docker/toolchains.json scripts/toolchain.sh $(if $(subst x$(GPU_SEEN),,x$(GPU_SEEN_NOW)),FORCE)
	@scripts/toolchain.sh gpu $@
    endif
  endif
else ifeq ($(TOOLCHAIN),)
  TOOLCHAIN := $(shell scripts/toolchain.sh versions | head -n 1)
endif

# Missing weights are fetched where SOURCE says from where; Meta's only with the URL that Meta sends.
FETCHABLE = $(if $(filter meta:%,$(SOURCE)),|| [ "$${META_URL:-}$${META_URL_FILE:-}" ],$(if $(SOURCE),|| true))
COMMA := ,
check = [[ '$($1)' =~ ^($2)$$ ]] || echo $1;
ifeq ($(strip $(REFUSED)),)
  REFUSED := $(shell $(call check,ENGINE,torch|tensorrt) $(call check,QUANT,$(if $(filter torch,$(ENGINE)),,|int8_wo|int4_awq|fp8|sq)) \
    $(call check,PP,$(if $(filter torch,$(ENGINE)),1,[1-9][0-9]*)) $(call check,DTYPE,|float16|bfloat16|float32) $(call check,HOST,.+) $(call check,STREAMING,on|off) $(call check,PAD_HEADS,$(if $(QUANT),off,on|off)) $(call check,TARGET,cpu|cuda) $(call check,BUILDER,|docker|buildah) $(call check,KV_REUSE,$(if $(filter torch,$(ENGINE)),off,on|off)) \
    $(foreach v,TP MAX_BATCH_SIZE MAX_TOKENS HTTP_PORT GRPC_PORT METRICS_PORT OPENAI_PORT,$(call check,$v,[1-9][0-9]{0$(COMMA)8})) \
    $(foreach v,CONTEXT MAX_INPUT_LEN MAX_SEQ_LEN MAX_NUM_TOKENS,$(call check,$v,|[1-9][0-9]{0$(COMMA)8})) \
    $(foreach v,CHAT_TEMPLATE API_KEY_FILE,[ -z '$($v)' ] || [ -f '$($v)' ] || echo $v;) \
    [ -z '$(TOOLCHAIN)' ] || grep -qsF '    "$(TOOLCHAIN)":' docker/toolchains.json || echo TOOLCHAIN; \
    [ -z '$(if $(filter tensorrt,$(ENGINE)),$(if $(ASKED),,$(filter-out $(NO_TOOLCHAIN),$(MAKECMDGOALS))))' ] || [ -z '$(ASSUME_GPU)' ] || echo ASSUME_GPU; \
    $(if $(ASKED)$(filter weights,$(MAKECMDGOALS)),,[ -d '$(WEIGHTS)' ] $(FETCHABLE) || echo WEIGHTS;) [ -z '$(PYTHON)' ] || [ "$$('$(PYTHON)' -c 'print(7)' 2>/dev/null)" = 7 ] || echo PYTHON)
endif
REFUSE := $(if $(strip $(REFUSED)),refuse)
