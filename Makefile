# On a machine with Python >= 3.11 and make, `make demo` and `make test` each do their own set-up.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STUDY ?= default
# Where it is set, every process of the tests would compile torch and all else anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help api demo test test-fast test-networks test-long test-chaos test-slurm test-ray test-wheel tables figures report status archive restore reproduce-mnist theorem1 reproduce-cifar10 mnist-attacks frame-cifar10 lr-cifar10 lr-cifar100 rivals-mnist rivals-cifar10 benchmark clean
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

# The stamp is newer than what it was made from, so a second call installs nothing.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("condlr needs Python >= 3.11, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@# Not compiled here, where it takes two of five minutes: Python compiles the tenth that is imported
	$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

api: $(VENV)/.installed  ## Make a page of every call of the library from its docstrings (build/api)
	$(RUN) -m pdoc condlr '!condlr.suite' '!condlr.report' --docformat google --output-directory build/api

demo: $(VENV)/.installed  ## Train four rows on real digits, attack them; table, figures, report
	$(RUN) scripts/train.py experiment=demo
	$(MAKE) --no-print-directory tables figures report STUDY=demo

test: $(VENV)/.installed  ## Lint, type check and test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	@# The type checker has one thread, and tests wait for processes of their own: three workers fill two cores
	$(RUN) -m basedpyright & types=$$!; $(RUN) -m pytest -n 3 --dist worksteal; tests=$$?; wait $$types && exit $$tests

test-fast: $(VENV)/.installed  ## The tests that sweep nothing and take no seconds
	$(RUN) -m pytest -n 2 --dist worksteal -m 'not slow'

test-long: $(VENV)/.installed  ## Train with each method, penalty and network in full, and other long tests (minutes)
	$(RUN) -m pytest -n 2 --dist worksteal -m long

test-chaos: $(VENV)/.installed  ## Kill a sweep's processes, fill and spoil its disk; it must end as if left alone (minutes)
	$(RUN) -m pytest -m chaos -s tests/chaos

test-wheel: $(VENV)/.installed  ## Build the wheel; install it into a fresh environment without the suite and with it
	$(RUN) -m pytest -m wheel -s -vv tests/wheel

# Without constraints: the launcher wants older releases of cloudpickle and python-dateutil than the others' newest
test-ray: $(VENV)/.installed  ## Kill workers and parents of a sweep under Ray, on two pretended GPUs (minutes)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[ray]'
	$(RUN) -m pytest -m ray -s -vv tests/ray

test-networks: $(VENV)/.installed  ## Factor, constrain, train and export 97 networks of other libraries; try their optimisers (10 minutes)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt 'timm>=1.0.31' 'pytorch-optimizer>=4.1.0'
	NETWORKS_TABLE=results/networks/table.md $(RUN) -m pytest -m networks -v tests/networks

# As root, with Debian's packages slurm-wlm munge slurmdbd mariadb-server; elsewhere the tests skip themselves and say so
test-slurm: $(VENV)/.installed  ## Kill and preempt the jobs of a sweep on a real Slurm that is started for it (seven minutes)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,slurm]'
	$(RUN) -m pytest tests/slurm -m slurm -s -v -rs

tables: $(VENV)/.installed  ## Collect the runs of STUDY, print and write its tables
	$(RUN) scripts/collect.py study=$(STUDY)
	$(RUN) scripts/tables.py study=$(STUDY)

figures: $(VENV)/.installed  ## Draw the figures of STUDY from its collected results
	$(RUN) scripts/figures.py study=$(STUDY)

report: $(VENV)/.installed  ## Write the report of STUDY, one HTML page, from its collected results
	$(RUN) scripts/report.py study=$(STUDY)

status: $(VENV)/.installed  ## How far the runs of STUDY are; live with ARGS='watch=true'
	$(RUN) scripts/status.py study=$(STUDY) $(ARGS)

archive: $(VENV)/.installed  ## Keep the finished runs of STUDY, without weights, in results/STUDY/runs.tar.gz
	$(RUN) scripts/archive.py study=$(STUDY)

restore: $(VENV)/.installed  ## Bring the runs in results/STUDY/runs.tar.gz back into runs/STUDY
	$(RUN) scripts/restore.py study=$(STUDY)

# LeNet5 leaves much of two cores idle: two runs at once train in 0.7 of the time. LAUNCHER= for one at a time
LAUNCHER ?= hydra/launcher=several

# What is missing is run, and what was interrupted goes on. ARGS are keys of train.yaml for all runs: ARGS='seed=0'
define reproduce
	$(foreach experiment,$(1),$(RUN) scripts/estimate.py experiment=$(experiment) study=$(STUDY) $(ARGS)
	)
	$(foreach experiment,$(1),-$(RUN) scripts/train.py experiment=$(experiment) study=$(STUDY) $(2) $(ARGS)
	)
	$(MAKE) --no-print-directory tables figures report STUDY=$(STUDY)
endef

reproduce-mnist: STUDY = reproduce_mnist
reproduce-mnist: $(VENV)/.installed  ## Run what is missing of Table 2 and Figures 1 and 2, LeNet5 on MNIST; report
	$(call reproduce,reproduce_mnist figure2,$(LAUNCHER))

theorem1: $(VENV)/.installed  ## Put Theorem 1 to the test on matrix flows that are known (a minute); report
	$(RUN) scripts/theorem1.py
	$(foreach page,tables figures report,$(RUN) scripts/$(page).py study=theorem1
	)

reproduce-cifar10: STUDY = reproduce_cifar10
reproduce-cifar10: $(VENV)/.installed  ## Run what is missing of Table 3, VGG16 on CIFAR-10 (a GPU's work); report
	$(call reproduce,reproduce_cifar10)

# What stronger attacks than FGSM are tried on
HARD := attack.images=1000
mnist-attacks: $(VENV)/.installed  ## Train eight rows on MNIST, attack them every way, audit the attacks (hours)
	$(RUN) scripts/train.py experiment=mnist_attacks seed=0,1 $(LAUNCHER)
	$(RUN) scripts/evaluate.py run='runs/mnist_attacks/*-s0-*' analysis=[audit,conditioning,guarantees,cost]
	$(RUN) scripts/evaluate.py run='runs/mnist_attacks/*' $(HARD) attack=fgsm
	$(RUN) scripts/evaluate.py run='runs/mnist_attacks/*' $(HARD) attack=pgd attack.restarts=3 attack.eps=[0.03,0.06,0.1] attack.loss=ce
	$(RUN) scripts/evaluate.py run='runs/mnist_attacks/*' $(HARD) attack=pgd attack.restarts=3 attack.eps=[0.03,0.06,0.1] attack.loss=margin
	$(RUN) scripts/evaluate.py run='runs/mnist_attacks/*-s0-*' $(HARD) attack=autoattack attack.eps=[0.06]
	$(MAKE) --no-print-directory tables figures report STUDY=mnist_attacks

frame-cifar10: $(VENV)/.installed  ## Train nine rows on CIFAR-10, penalties of layers and CondLR, attack them, shift them (hours)
	-$(RUN) scripts/train.py -m experiment=frame_cifar10,frame_without_decay,frame_matched $(ARGS)
	$(RUN) scripts/evaluate.py run='runs/frame_cifar10/*' analysis=[conditioning,frame_bounds,recovery,cost]
	$(RUN) scripts/evaluate.py run='runs/frame_cifar10/*' shift=corruptions shift.images=1000
	$(RUN) scripts/evaluate.py run='runs/frame_cifar10/*' $(HARD) attack=pgd attack.eps=[0.004]
	$(RUN) scripts/evaluate.py run='runs/frame_cifar10/*' $(HARD) attack=simba attack.eps=[0,0.2]
	$(RUN) scripts/evaluate.py run='runs/frame_cifar10/*-s0-*' $(HARD) attack=simba attack.eps=[0,0.5,1,2,4,8] attack.iterations=[1]
	$(RUN) scripts/evaluate.py run='runs/frame_cifar10/*-s0-*' analysis=[reconstruction,guarantees]
	$(RUN) scripts/evaluate.py run='runs/frame_cifar10/*-s0-*' attack.images=200 attack=autoattack attack.eps=[0.004]
	$(MAKE) --no-print-directory tables figures report STUDY=frame_cifar10

lr-cifar10: $(VENV)/.installed  ## Train eight rows on CIFAR-10, low-rank activations and their rivals, attack and analyse them (hours)
	-$(RUN) scripts/train.py experiment=lr_cifar10 $(ARGS)
	$(RUN) scripts/evaluate.py run='runs/lr_cifar10/*' analysis=[conditioning,cost,variance_ratio,effective_rank,cushion,embeddings,stability,scatter] 'analysis.variance_ratio.layers=[stage3,fc.input]' 'analysis.embeddings.layers=[stage3,fc.input]' 'analysis.stability.layers=[stage3,fc.input]'
	$(RUN) scripts/evaluate.py run='runs/lr_cifar10/*' shift=corruptions shift.images=1000
	$(RUN) scripts/evaluate.py run='runs/lr_cifar10/*' $(HARD) attack=pgd attack.eps=[0.004]
	$(RUN) scripts/evaluate.py run='runs/lr_cifar10/*' $(HARD) attack=pgd attack.steps=20 attack.loss=ce attack.eps=[8/255,10/255,16/255,20/255]
	$(RUN) scripts/evaluate.py run='runs/lr_cifar10/*' $(HARD) attack=pgd attack.steps=7 attack.loss=ce attack.eps=[8/255,10/255,16/255,20/255]
	$(RUN) scripts/evaluate.py run='runs/lr_cifar10/*' attack=deepfool
	$(RUN) scripts/evaluate.py run='runs/lr_cifar10/*' $(HARD) attack=noise
	$(RUN) scripts/evaluate.py run='runs/lr_cifar10/*-s0-*' attack.images=200 attack=autoattack attack.eps=[0.004]
	$(RUN) scripts/evaluate.py run='runs/lr_cifar10/*-s0-*' $(HARD) analysis=audit
	$(MAKE) --no-print-directory tables figures report STUDY=lr_cifar10

define attack_rivals
	$(RUN) scripts/evaluate.py run='runs/$(1)/*' analysis=[conditioning,cost]
	$(RUN) scripts/evaluate.py run='runs/$(1)/*' $(HARD) attack=pgd attack.restarts=3 $(PGD)
	$(RUN) scripts/evaluate.py run='runs/$(1)/*-s0-*' attack=autoattack $(AUTOATTACK)
	$(MAKE) --no-print-directory tables figures report STUDY=$(1)
endef

rivals-mnist: PGD = attack.eps=[0.06,0.1]
rivals-mnist: AUTOATTACK = attack.images=500 attack.eps=[0.1]
rivals-mnist: $(VENV)/.installed  ## Train CondLR and its rivals on MNIST at equal weights, and adversarially, attack them (a day)
	-$(RUN) scripts/train.py experiment=rivals_mnist $(LAUNCHER) $(ARGS)
	-$(RUN) scripts/train.py experiment=rivals_mnist_adversarial $(LAUNCHER) $(ARGS)
	$(call attack_rivals,rivals_mnist)
	$(call attack_rivals,rivals_mnist_adversarial)

rivals-cifar10: PGD = attack.eps=[0.004,8/255]
rivals-cifar10: AUTOATTACK = attack.images=200 attack.eps=[0.004]
rivals-cifar10: $(VENV)/.installed  ## Train seven rivals at equal weights on CIFAR-10, attack them (hours on a GPU, a day without)
	-$(RUN) scripts/train.py experiment=rivals_cifar10 $(ARGS)
	$(call attack_rivals,rivals_cifar10)

lr-cifar100: $(VENV)/.installed  ## Train three rows of ResNet-50 on CIFAR-100's superclasses, and classify its classes (hours on a GPU)
	-$(RUN) scripts/train.py experiment=lr_cifar100 $(ARGS)
	$(RUN) scripts/evaluate.py run='runs/lr_cifar100/*' analysis=[variance_ratio,embeddings,transfer,scatter]
	$(MAKE) --no-print-directory tables figures report STUDY=lr_cifar100

benchmark: $(VENV)/.installed  ## Measure what a training step costs here, dense, low-rank and constrained
	$(RUN) scripts/benchmark.py $(ARGS)

clean:  ## Remove the environment and caches; runs and results stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info
