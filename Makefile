# NOA ARK. `make run` installs, builds, starts and demonstrates; `make test` runs every test; `make bench` measures;
# `make soak` does for long what `make test` does briefly: ARK_CHAOS_ROUNDS=200 ARK_CHAOS_SEED=7 ARK_SOAK_ROUNDS=5000 make soak.
# Everything made lands in build/ (and target/ for cargo); each step is cached by what it is made from.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

ROOT   := $(CURDIR)
BUILD  := $(ROOT)/build
BIN    := $(BUILD)/bin
ARK    := $(BIN)/ark
TARGET := $(ROOT)/target/x86_64-unknown-linux-gnu

# Under sudo, cargo is often only in the calling user's home.
CARGO ?= $(shell command -v cargo || ls /root/.cargo/bin/cargo "/home/$$SUDO_USER/.cargo/bin/cargo" 2>/dev/null | head -n 1)
# Says what runs and how long it took; the times of a fresh clone are what `make bench` reports.
export CARGO
STEP   := tests/step.sh

PROGRAMS := ark arkd ark-vmm ark-guestd ark-ai

# Always all packages together, whatever is taken of them: cargo builds one anew for each set of features that others ask it for.
ALL      := --workspace --locked
# Tests have llama.cpp from here, compiled once for release and tests.
export CMAKE_C_COMPILER_LAUNCHER := ccache
export CMAKE_CXX_COMPILER_LAUNCHER := ccache
export CCACHE_DIR := $(BUILD)/.cache/ccache
export CCACHE_BASEDIR := $(ROOT)
export CCACHE_NOHASHDIR := 1

.PHONY: run test soak bench stop clean install deps programs inference model kernel images models machine all lint unit inference-tests api-fuzz \
  mcp-peers test-images vm-tests machine-tests help

run: all
	@echo
	@echo '── Where agents run here ─────────────────────────────────────────────────────'
	$(ARK) doctor
	@echo
	@echo '── A program of yours in a microVM of its own ────────────────────────────────'
	$(ARK) run --image python -- python3 -c 'print(6*7)'
	@$(STEP) --first-output
	@echo
	@echo '── This README, counted in one VM and ranked in another ──────────────────────'
	$(ARK) run --image base -- wc < README.md
	$(ARK) run --image python -- python3 -c "$$RANK_WORDS" < README.md
	@echo
	@echo '── An agent that stays ───────────────────────────────────────────────────────'
	@$(ARK) rm demo >/dev/null 2>&1 || true
	$(ARK) create --image python --name demo --vcpus 2 --memory 256
	$(ARK) cp README.md demo:/root/
	$(ARK) exec demo -- sh -c 'uname -sr; nproc; ls -l /root'
	@echo
	@echo '── Two branches of it while it runs, each checked by the host ────────────────'
	@$(ARK) rm demo-1 demo-2 >/dev/null 2>&1 || true
	$(ARK) fork demo -n 2
	$(ARK) exec demo-2 -- sh -c 'hostname; cat /etc/machine-id; ls /root'
	$(ARK) receipt demo-2
	$(ARK) ps
	$(ARK) rm demo demo-1 demo-2
	@echo
	@echo '── Code in an interpreter that is warm already ───────────────────────────────'
	$(ARK) template build py --image python --warm 'import numpy'
	$(ARK) eval --template py 'import numpy; numpy.arange(10).reshape(2, 5) @ numpy.arange(5)'
	@echo
	@echo '── A language model in a VM of its own, asked from within an agent without a network ──'
	$(ARK) run --image python --allow inference -- python3 -c 'import ark; print(ark.ai.chat("Which agent should sort invoices into folders by year?"))'
	$(ARK) chat 'Explain what this Python function does'
	$(ARK) models
	@echo
	@echo "It works. Go on with:"
	@echo "  export PATH=$(BIN):\$$PATH"
	@echo "  ark run --image python -- python3          # any program; stdin, stdout and Ctrl-C are yours"
	@echo "  ark create --image python --name a1        # an agent that stays: ark exec -it a1 -- sh, ark cp, ark logs, ark rm"
	@echo "  ark fork a1 -n 10; ark pause a1; ark snapshot a1 s1; ark restore s1; ark eval --template py '6*7'"
	@echo "  ark --help        make test        make bench        make stop"

define RANK_WORDS
import re, sys, numpy
words, counts = numpy.unique(re.findall(r'[a-z]{5,}', sys.stdin.read().lower()), return_counts=True)
for i in numpy.argsort(-counts, kind='stable')[:5]: print(f'{counts[i]:4} {words[i]}')
endef
export RANK_WORDS

all: deps programs inference kernel images models machine

# Debian packages, each with its reason in the one list, by section. apt-get is asked only for what is missing.
SECTIONS := build inference run
test soak: SECTIONS += test
bench: SECTIONS += bench
deps:
	@wanted=$$(for s in $(SECTIONS); do sed -n "/^# section: $$s$$/,/^# section:/s/^\([a-z0-9][a-z0-9.+-]*\).*/\1/p" \
	  guest-images/debian-packages.txt; done | sort -u); \
	missing=$$(comm -23 <(echo "$$wanted") <(dpkg-query -W -f '$${Package} $${db:Status-Abbrev}\n' | awk '$$2 == "ii" {print $$1}' | sort -u)); \
	if [ -n "$$missing" ]; then \
	  sudo=; [ "$$(id -u)" = 0 ] || sudo=sudo; \
	  $(STEP) "Debian packages" $$sudo sh -c "apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $$(echo $$missing)"; \
	fi
	@[ -x "$(CARGO)" ] || { echo "make: cargo is missing; install Rust (https://rustup.rs) and try again" >&2; exit 1; }

# Static release binaries. A file is replaced only when it changed, so that what is made from it stays cached.
programs: deps
	@$(STEP) "Rust programs" $(CARGO) build --release $(ALL) $(PROGRAMS:%=--bin %)
	@mkdir -p $(BIN)
	@for p in $(PROGRAMS); do \
	  cmp -s $(TARGET)/release/$$p $(BIN)/$$p || { cp $(TARGET)/release/$$p $(BIN)/.$$p.new && mv $(BIN)/.$$p.new $(BIN)/$$p; }; \
	done

# The server of models, in an image of its own.
inference: deps
	@$(STEP) "inference server" agents/inference/build.sh
	@$(STEP) "inference image" guest-images/image.sh inference

# The bundled model anew, of its templates: minutes of training. What is in the repository came of it, so nothing here depends on it.
model: SECTIONS += model
model: deps
	@$(STEP) "bundled model" agents/router-model/train.sh

kernel: deps
	@$(STEP) "guest kernel" guest-kernel/build.sh

images: deps programs
	@$(STEP) "guest images" sh -c 'guest-images/image.sh base && guest-images/image.sh python && guest-images/guestd-cpio.sh'

# The model that comes with the release.
models: $(BUILD)/models/router.gguf
$(BUILD)/models/%.gguf: agents/router-model/model/%.gguf
	@mkdir -p $(@D)
	@cp $< $(@D)/.$*.new && mv $(@D)/.$*.new $@

machine: kernel images inference models
	@$(STEP) "emulated host" guest-images/machine/build.sh

test: all lint unit inference-tests api-fuzz mcp-peers vm-tests machine-tests
	@echo "make test: everything passed"

# After `inference`, here and below: two C++ builds at once, or the first of them without a cache, would take twice as long.
lint: inference
	@$(STEP) "rustfmt" $(CARGO) fmt --all --check
	@$(STEP) "clippy" $(CARGO) clippy $(ALL) --all-targets -- -D warnings

# Unit, property, snapshot and style tests: no VM. Twice as many at once as CI has processors, for most of them wait.
unit: inference
	@$(STEP) "unit tests" env RUST_TEST_THREADS=4 $(CARGO) test $(ALL)

# The inference server against the MCP SDK for Python, and the bundled model against what its card says.
MCP := $(BUILD)/.cache/mcp
inference-tests: SECTIONS += test
inference-tests: inference $(MCP)/.made
	@$(STEP) "inference server against a client of MCP" env ARK_MCP_PYTHON=$(MCP)/bin/python \
	  $(CARGO) test $(ALL) --test server -- --ignored
	@$(STEP) "bundled model against its card" env ARK_INFERENCE=$(BIN)/ark-inference agents/router-model/train.sh test

$(MCP)/.made: agents/inference/tests/requirements.txt | deps
	@$(STEP) "MCP SDK for Python" sh -c 'python3 -m venv --clear $(MCP) && \
	  $(MCP)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r $<'
	@touch $@

# The REST API against its OpenAPI document, by a fuzzer that reads it, over VMMs that are fakes: no VM.
SCHEMATHESIS := $(BUILD)/.cache/schemathesis
api-fuzz: SECTIONS += test
api-fuzz: inference $(SCHEMATHESIS)/.made
	@$(STEP) "REST API against its document" env ARK_SCHEMATHESIS=$(SCHEMATHESIS)/bin/st \
	  $(CARGO) test $(ALL) --test api -- --ignored conformance

$(SCHEMATHESIS)/.made: tests/api-fuzz/requirements.txt | deps
	@$(STEP) "schemathesis" sh -c 'python3 -m venv --clear $(SCHEMATHESIS) && \
	  $(SCHEMATHESIS)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r $<'
	@touch $@

# The MCP server of arkd against the conformance suite of MCP's makers, over VMMs that are fakes: no VM.
MCP_PEERS := $(BUILD)/.cache/mcp-peers
mcp-peers: SECTIONS += test
mcp-peers: inference $(MCP_PEERS)/.made
	@$(STEP) "MCP conformance" env ARK_MCP_PEERS=$(MCP_PEERS) $(CARGO) test $(ALL) --test api -- --ignored mcp_peers

$(MCP_PEERS)/.made: $(addprefix tests/mcp-peers/,install.sh requirements.txt package.json package-lock.json) | deps
	@$(STEP) "clients of MCP from npm" tests/mcp-peers/install.sh $(MCP_PEERS)
	@touch $@

# OpenAI's own client, which talks to arkd from the host and, in an image of its own, from within an agent.
OPENAI := $(BUILD)/.cache/openai
$(OPENAI)/.made: tests/openai/requirements.txt | deps
	@$(STEP) "openai for Python" sh -c 'python3 -m venv --clear $(OPENAI) && \
	  $(OPENAI)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r $<'
	@touch $@

# Images that only tests have.
test-images: SECTIONS += test
test-images: images $(OPENAI)/.made
	@$(STEP) "images for tests" tests/openai/image.sh $(OPENAI)/bin/pip

# Whole VMs, on usable KVM or in the emulated host; the script says which.
vm-tests: all test-images
	@$(STEP) "whole-VM tests" tests/on-kvm.sh vm

machine-tests: SECTIONS += test
machine-tests: all $(OPENAI)/.made $(MCP_PEERS)/.made
	@$(STEP) "emulated-host tests" env ARK_ASSETS=$(BUILD) ARK_OPENAI_PYTHON=$(OPENAI)/bin/python ARK_MCP_PEERS=$(MCP_PEERS) \
	  $(CARGO) test $(ALL) --test machine -- --test-threads 1

# arkd killed at many points of a mixed load, against a stand-in for the VMM and on real VMs, and many rounds of fork, exec and
# delete. Every failure names its seed.
ARK_CHAOS_ROUNDS ?= 100
ARK_SOAK_ROUNDS ?= 2000
soak: export ARK_CHAOS_ROUNDS := $(ARK_CHAOS_ROUNDS)
soak: export ARK_SOAK_ROUNDS := $(ARK_SOAK_ROUNDS)
soak: all
	@$(STEP) "chaos, no VM" $(CARGO) test $(ALL) --test api -- --nocapture chaos::
	@$(STEP) "chaos and soak, whole VMs" tests/on-kvm.sh vm --test-threads 1 --nocapture chaos:: soak::
	@echo "make soak: everything passed"

bench: all
	@tests/bench.sh

# Ends everything that `make run` started.
stop:
	@if [ -x $(ARK) ]; then $(ARK) stop; else echo "nothing was built, so nothing runs"; fi

# PREFIX=/usr/local: a copy that no longer needs this checkout.
PREFIX ?= /usr/local
# Where systemd looks for units of an administrator's own.
UNITS ?= /etc/systemd/system
install: all
	install -d $(DESTDIR)$(PREFIX)/lib/ark $(DESTDIR)$(PREFIX)/bin
	cp -r $(BUILD)/bin $(BUILD)/kernel $(BUILD)/images $(BUILD)/models $(BUILD)/machine $(DESTDIR)$(PREFIX)/lib/ark/
	ln -sf ../lib/ark/bin/ark $(DESTDIR)$(PREFIX)/bin/ark
	install -m 0644 control-plane/dist/arkd.toml $(DESTDIR)$(PREFIX)/lib/ark/
	install -d $(DESTDIR)$(UNITS)
	sed 's|@LIB@|$(PREFIX)/lib/ark|' control-plane/dist/arkd.service > $(DESTDIR)$(UNITS)/arkd.service

clean: stop
	rm -rf $(BUILD) $(ROOT)/target

help:
	@sed -n '1,4s/^# //p' Makefile
