# The lines of *The proof* in README.md, all at once on the GPUs of one machine:
#
#     make -f recipes/emoji/proof.mk -j 12 GPUS=4
#
# from the root of the repository, with the data's art.zip and processor in their places. Each line begins as soon as
# what it needs is there, and goes on where it stopped when make is run again. An outputs/tiny/stage0 that is there is
# used. What a line says is in outputs/emoji/proof/logs. Of the GPUs in CUDA_VISIBLE_DEVICES, where that is set, the
# first ones are used.

GPUS ?= 1
PYTHON ?= python
SEEDS ?= 0 1

P := outputs/emoji/proof
RECIPE := recipes/emoji
EXPORT := $(RECIPE)/data/export
CONFIGS := recipes/accelerate_configs
DONE := $(P)/done
STAGE0 := outputs/tiny/stage0

SETS := test test_artist
GRPO := $(foreach seed,$(SEEDS),grpo-$(seed)) grpo-no-tools-0 $(foreach seed,$(SEEDS),full-$(seed)) full-need-0
OFF := $(foreach seed,$(SEEDS),full-tools-off-$(seed))

comma := ,
space := $() $()
cards := $(wordlist 1,$(GPUS),$(subst $(comma), ,$(or $(CUDA_VISIBLE_DEVICES),$(shell seq -s, 0 $$(($(GPUS) - 1))))))
ifneq ($(words $(cards)),$(GPUS))
$(error CUDA_VISIBLE_DEVICES names fewer than $(GPUS) GPUs)
endif
# A line's GPU: its place among all, so that neighbours get different ones.
place = $(words $(shell printf '%s\n' $(GRPO) $(OFF) sft-0 rsft-0 | sed '/^$(1)$$/q'))
on = CUDA_VISIBLE_DEVICES=$(word $(shell echo $$(($(call place,$(1)) % $(GPUS) + 1))),$(cards))
on_all := CUDA_VISIBLE_DEVICES=$(subst $(space),$(comma),$(cards))
say = > $(P)/logs/$(1).log 2>&1 && touch $@

launch := $(PYTHON) -m accelerate.commands.launch
one := $(launch) --config_file $(CONFIGS)/single_gpu.yaml -m
ifeq ($(GPUS),1)
team := $(on_all) $(one)
torchrun := $(on_all) $(PYTHON)
batch :=
else
ifneq ($(shell echo $$((128 % $(GPUS)))),0)
$(error $(GPUS) GPUs cannot share a batch of 128; use 1, 2, 4 or 8)
endif
team := $(on_all) $(launch) --config_file $(CONFIGS)/ddp.yaml --num_processes $(GPUS) -m
torchrun := $(on_all) $(PYTHON) -m torch.distributed.run --nproc-per-node $(GPUS)
batch := --per_device_train_batch_size $(shell echo $$((128 / $(GPUS)))) --gradient_accumulation_steps 1
endif

.PHONY: all
all: $(foreach run,sft-0 rsft-0 $(GRPO) $(OFF),$(foreach set,$(SETS),$(DONE)/evaluate-$(run)-$(set)))

$(DONE):
	mkdir -p $(DONE) $(P)/logs $(P)/accepted

$(DONE)/render: | $(DONE)
	$(PYTHON) $(RECIPE)/build_data.py --steps render $(call say,render)

# `nice`, since stage 0 trains against the clock at the same time, and needs some cores.
$(DONE)/lessons $(DONE)/held-out: $(DONE)/%: $(DONE)/render
	nice $(PYTHON) $(RECIPE)/build_data.py --steps $* $(call say,$*)

$(DONE)/cold_start: $(DONE)/render
	nice $(PYTHON) $(RECIPE)/cold_start.py $(call say,cold_start)

$(DONE)/stage0: $(DONE)/render
	(test -e $(STAGE0)/reranker_config.json || $(torchrun) $(RECIPE)/train_tiny.py --out outputs/tiny --minutes 6 \
		--seed 4 --resume stage0 --base vretrver_hf/assets/vretrver-tiny) $(call say,stage0)

$(DONE)/sft-0: $(DONE)/stage0 $(DONE)/cold_start
	$(team) vretrver_hf.training.sft --config $(RECIPE)/sft.yaml --output_dir $(P)/sft-0 $(batch) \
		$(call say,sft-0)

$(DONE)/sample: $(DONE)/sft-0 $(DONE)/lessons
	began=$$(date +%s) && $(team) vretrver_hf sample --model $(P)/sft-0 --data $(EXPORT)/rsft.parquet \
		--out $(P)/accepted --num-samples 4 --batch-size 512 > $(P)/logs/sample.log 2>&1 && \
		echo $$(($(GPUS) * ($$(date +%s) - began))) > $(P)/accepted/seconds.txt && touch $@

$(DONE)/rsft-0: $(DONE)/sample
	$(team) vretrver_hf.training.rsft --config $(RECIPE)/rsft.yaml --model_name_or_path $(P)/sft-0 \
		--dataset_name $(P)/accepted --output_dir $(P)/rsft-0 $(batch) $(call say,rsft-0)

base = $(if $(filter grpo-%,$(1)),sft-0,rsft-0)
.SECONDEXPANSION:
$(GRPO:%=$(DONE)/%): $(DONE)/%: $(DONE)/lessons $(DONE)/$$(call base,$$*)
	$(call on,$*) $(one) vretrver_hf.training.grpo --config $(RECIPE)/grpo.yaml --model_name_or_path $(P)/$(call base,$*) \
		--seed $(lastword $(subst -, ,$*)) --output_dir $(P)/$* \
		$(if $(filter grpo-no-tools-%,$*),--tools false) $(if $(filter full-need-%,$*),--reward need) $(call say,$*)

trained = $(subst full-tools-off,full,$(1))
define evaluation
$(DONE)/evaluate-$(1)-$(2): $(DONE)/$(call trained,$(1)) $(DONE)/held-out
	$$(call on,$(1)) $(PYTHON) -m vretrver_hf.evaluation --model $(P)/$(call trained,$(1)) \
		$(if $(filter full-tools-off-%,$(1)),--no-tools) --data $(EXPORT)/$(2).parquet --batch-size 256 --trajectories \
		--out $(P)/evaluations/$(1)/$(2) $$(call say,evaluate-$(1)-$(2))
endef
$(foreach run,sft-0 rsft-0 $(GRPO) $(OFF),$(foreach set,$(SETS),$(eval $(call evaluation,$(run),$(set)))))
