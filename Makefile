# make demo       train three models alike on the embedded data set and print the table (12 to 20 minutes on 2 cores)
# make test       lint, types, import directions, tests
# make test-all   the same, then the slow tests
# make test-cuda  the tests that need a GPU, alone (make test skips them where there is none)
# make gpu-benchmark  all measurements of a GPU, twelve minutes of an H100; runs/gpu/gpu.json and the tables of it
# make lint       ruff and mypy alone
# make oldest     the whole test suite with the lowest versions that pyproject.toml allows, and its column of docs/versions.md
# make newest     the same with the newest of everything, whatever constraints.txt says
# make comparison  the tables and plots of docs/comparison.md: 63 models, more than two hours on 2 cores; goes on where it stopped
# make longform    the section of docs/comparison.md on long videos: twelve models, half an hour of one core, then six of them
#                 at 96 frames; goes on where it stopped
# make -j2 videollm-comparison  the table and plot of docs/videollm_comparison.md: three tiny video-language models are trained,
#                 and asked with every method at three budgets; two hours on 2 cores; goes on where it stopped
# make floors     draw docs/floors.svg anew, of the table of imports
# make versions   the same with the locked versions, and all that builds on transformers in five versions of it
# make lock       write constraints.txt anew; UPGRADE=--upgrade for the newest versions, else what fits stays
#
# Each prepares .venv by itself, with the exact versions of constraints.txt, when that file or pyproject.toml is newer than
# it. PYTHON chooses the interpreter (3.10 to 3.13).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# with compiled tests kept, even where Python is told not to: a worker takes 9 CPU seconds to compile them
RUN := PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONDONTWRITEBYTECODE=
# also for what packages are built with
PINNED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
UPGRADE ?=
RESOLUTION_oldest := lowest-direct
RESOLUTION_newest := highest

.PHONY: demo test test-all test-cuda gpu-benchmark lint comparison longform videollm-comparison floors oldest newest versions lock

demo: $(READY)
	$(RUN) $(BIN)/python recipes/motion_demo.py

test: lint
	$(RUN) $(BIN)/python -m pytest

test-all: test
	$(RUN) $(BIN)/python -m pytest -m slow

test-cuda: $(READY)
	$(RUN) $(BIN)/python -m pytest tests/cuda tests/kernels/cases.py

gpu-benchmark: $(READY)
	$(RUN) $(BIN)/python eval/gpu.py --output runs/gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

TWO_AT_A_TIME := --seeds 0 1 2 --parallel 2 --page docs/comparison.md
OF_TIME := none none:num_frames=4 temporal_only tempme reduction_only tome:tokens=32 evit:tokens=32 diffrate:tokens=32 \
	sta:tokens=32 testa:budget=0.6 centerclip:tokens=32 random:tokens=32 uniform:tokens=32 pool:budget=0.6
OF_SPACE := none tempme tome:tokens=32 evit:tokens=32 random:tokens=32 uniform:tokens=32 pool:tokens=40

comparison: $(READY)
	$(RUN) $(BIN)/python eval/compare.py --dataset motion --methods $(OF_TIME) --output runs/compare/motion --train epochs=3 $(TWO_AT_A_TIME)
	$(RUN) $(BIN)/python eval/compare.py --dataset detail --methods $(OF_SPACE) --output runs/compare/detail --train epochs=2 $(TWO_AT_A_TIME)

# TESTA's tower, its aggregation, its frames apart and with TempMe; then what the first two have learnt, at 96 frames
OF_ORDER := none testa:r_temporal=6,r_spatial=1 none:attention=apart \
	"tempme:attention=apart,r=1,merge_layers=1 2,merge_frames=4 8,cross_percent=30,intra_percent=10"
EVENTS := runs/compare/events
LONGER := $(foreach seed,0 1 2,$(EVENTS)-96/none-seed$(seed) $(EVENTS)-96/testa_r_temporal-6_r_spatial-1-seed$(seed))

longform: $(READY)
	$(RUN) $(BIN)/python eval/compare.py --dataset events --methods $(OF_ORDER) --seeds 0 1 2 --output $(EVENTS) \
		--train model=testa:mini epochs=10 rerank=0 clip-position-std=0.5 --page docs/comparison.md
	$(MAKE) $(LONGER:%=%/report.json)

AT_96 := $(RUN) $(BIN)/deepspeed --num_accelerators 1 recipes/full_ft_msrvtt.py --dataset events --model testa:mini --epochs 0 \
	--num-frames 96 --rerank 0

$(EVENTS)-96/none-%/report.json: $(EVENTS)/none-%/report.json
	$(AT_96) --pretrained $(<D)/best --method none --output $(@D)

$(EVENTS)-96/testa_%/report.json: $(EVENTS)/testa_%/report.json
	$(AT_96) --pretrained $(<D)/best --method testa --method-options r_temporal=16 r_spatial=1 --output $(@D)

HOSTS := $(addprefix runs/videollm/host-,0 1 2)

videollm-comparison: $(READY) $(HOSTS:%=%/predictions.json)
	$(RUN) $(BIN)/tempme-vl videollm-compare --host $(HOSTS:%=%/best) --retention 0.5 0.25 0.1 --questions 300 \
		--repeats 4 --in-flight 1 8 --output runs/videollm/compare --page docs/videollm_comparison.md

# a port for each, for make -j2
runs/videollm/host-%/predictions.json: | $(READY)
	$(RUN) $(BIN)/deepspeed --num_accelerators 1 --master_port 2951$* recipes/videollm_lora.py --host tiny:Qwen2_5_VL --method none \
		--where tower --train-frontend --train-language-model --num-frames 16 --image-size 32 --answer-tokens 8 --batch-size 32 \
		--eval-batch-size 64 --workers 0 --lr 1.5e-3 --lr-new 1.5e-3 --warmup 0.1 --weight-decay 0.05 --beta2 0.98 --epochs 5 \
		--seed $* --output $(@D)

floors: $(READY)
	PYTHONPATH=tests $(BIN)/python tests/floors.py

oldest newest: $(READY)
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) .venvs/$@
	$(BIN)/uv pip install --quiet --python .venvs/$@/bin/python --resolution $(RESOLUTION_$@) --editable '.[dev]'
	PATH="$(CURDIR)/.venvs/$@/bin:$$PATH" .venvs/$@/bin/python tests/suite.py $@

versions: $(READY)
	$(RUN) $(BIN)/python tests/suite.py locked
	$(BIN)/python tests/versions.py

lock: $(READY)
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.10 --extra dev --extra tensorboard $(UPGRADE) \
		--quiet --no-annotate --custom-compile-command "make lock" --output-file constraints.txt

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(not (3, 10) <= v <= (3, 13) and f'expected Python 3.10 to 3.13, for which constraints.txt has versions; got {v[0]}.{v[1]}: give another, make ... PYTHON=python3.12')"
	$(PYTHON) -m venv --clear $(VENV)
	$(PINNED) $(BIN)/python -m pip install --quiet pip
	$(PINNED) $(BIN)/python -m pip install --quiet --editable '.[dev]'
	@echo "installed: $$($(BIN)/python -m pip freeze --all --exclude-editable | tr '\n' ' ')"
	touch $(READY)
