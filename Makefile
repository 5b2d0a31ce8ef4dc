# Flatwire. `make help` lists what there is; `make demo` and `make test` are all a newcomer needs.
SHELL := /bin/bash
.DEFAULT_GOAL := help
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
TRIPLE := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')
BIN := $(TARGET_DIR)/flatwire
# The plugin is started for every pod. musl starts at once where glibc first asks the processor what it can do, which on a virtual
# machine takes half as long as all the rest of a start. Where rustup cannot fetch it the plugin is linked with glibc like the others.
MUSL := $(TRIPLE:-gnu=-musl)
PLUGIN_TRIPLE = $(if $(wildcard $(shell rustc --print sysroot)/lib/rustlib/$(MUSL)/lib),$(MUSL),$(TRIPLE))
# Linked to a fixed address: ten thousand relocations are half of what starting the plugin costs, for every pod.
PLUGIN_FLAGS := -C relocation-model=static

.PHONY: help
help: ## List the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{ printf "  make %-15s %s\n", $$1, $$2 }'

.PHONY: demo
demo: build ## Two nodes on one machine: pods, a full ping matrix, then everything deleted (no AWS account)
	$(BIN)/lab demo

.PHONY: test
test: need-root deps build ## Every test: unit, property, namespaces, CNI conformance, the lab, LocalStack and moto
	tests/run.sh

.PHONY: fleet
fleet: ## NODES (1000) nodes scale out at once on one account's buckets, under the pool and under the add-on's policy
	cargo run --release -q -p lab-sim -- fleet --nodes $(or $(NODES),1000)

.PHONY: calls
calls: ## What fresh nodes ask of EC2 until their pods are served, beside the least that the limits allow
	cargo run --release -q -p lab-sim -- calls

.PHONY: planted
planted: ## Plant ten classic bugs one by one in a copy of the code, and have the simulator find each
	cargo run --release -q -p lab-sim --bin planted

.PHONY: matrix
matrix: need-root build ## Every way of a packet beside kube-proxy's rules, in each of its modes, over IPv4 and IPv6, with the pod on a primary and a secondary ENI
	$(BIN)/lab matrix

.PHONY: e2e
e2e: need-root build ## Kubernetes on the lab, Flatwire by the chart: 200 pods, drain, roll, removal (first time 10 min more, to build Kubernetes)
	FLATWIRE_BIN_DIR=$$(cd $(BIN) && pwd) tests/e2e/run.sh judge $(TARGET_DIR)/$(TRIPLE)/release

.PHONY: cluster
cluster: need-root build ## Kubernetes on the lab without a CNI, to install Flatwire there by hand (Ctrl-C ends it)
	FLATWIRE_BIN_DIR=$$(cd $(BIN) && pwd) tests/e2e/run.sh stay $(TARGET_DIR)/$(TRIPLE)/release

.PHONY: crash
crash: need-root build ## Kill the daemon at every point where it changes something, on the live lab, and compare what is left
	FLATWIRE_BIN_DIR=$$(cd $(BIN) && pwd) cargo test --release --workspace --test points -- --nocapture

.PHONY: heal
heal: build ## Undo what ipamd keeps in a node's kernel, piece by piece under traffic, and measure each gap
	$(BIN)/lab heal

.PHONY: restart
restart: need-root build ## How soon a restarted daemon with 250 pods answers its first ADD, with EC2 out of reach
	FLATWIRE_BIN_DIR=$$(cd $(BIN) && pwd) cargo test --release --workspace --test restart -- --nocapture

.PHONY: bench
bench: need-root build ## What a packet and a pod cost, beside other layouts and the floor; report and pictures in target/bench
	$(BIN)/lab bench --out $(TARGET_DIR)/bench

.PHONY: chart
chart: deps ## Render chart and plain manifest with Helm's engine, and validate them against Kubernetes' schemas
	tests/chart.sh deploy/chart --write

.PHONY: iam
iam: need-root build ## Prove each IAM policy minimal: every action in it is called, one less is refused, none else is ever called
	tests/iam.sh

.PHONY: terraform-check
terraform-check: deps ## The Terraform modules: rules, and fmt, validate and test where terraform or tofu is there (no AWS)
	tests/terraform.sh

.PHONY: need-root
need-root:
	@[ "$$(id -u)" = 0 ] || { echo 'test: network namespaces need root: sudo env "PATH=$$PATH" "HOME=$$HOME" make test' >&2; exit 2; }

.PHONY: build
build: deps ## Release binaries, all static, in target/flatwire
	@echo "build: the EC2 SDK is 1.2 million lines; the first build takes minutes, the next ones seconds"
	cargo build --release --workspace --bins
	cargo rustc --profile plugin --target $(PLUGIN_TRIPLE) -p aws-cni --bin aws-cni -- $(PLUGIN_FLAGS)
	@mkdir -p $(BIN)
	@install -m 0755 $(TARGET_DIR)/$(TRIPLE)/release/{ipamd,lab,lab-ec2} $(TARGET_DIR)/$(PLUGIN_TRIPLE)/plugin/aws-cni $(BIN)/
	@ls -lh $(BIN) | awk 'NR > 1 { printf "  %-8s %s\n", $$5, $$9 }'

.PHONY: sim
sim: ## A minute of fresh seeds of the simulated world (SEED=n replays one, SIM_SECONDS=n takes longer)
	cargo run --release -q -p lab-sim -- run $(if $(SEED),--seed $(SEED),--seconds $(or $(SIM_SECONDS),60))

.PHONY: museum
museum: ## Outages that others have reported, with a naive policy and with ours
	cargo run --release -q -p lab-sim -- museum

.PHONY: lab
lab: build ## A lab that stays up, to play with (Ctrl-C ends it)
	$(BIN)/lab up

.PHONY: clean-lab
clean-lab: ## Remove whatever a killed lab left
	@if [ -x $(BIN)/lab ]; then $(BIN)/lab clean; else echo "clean-lab: no lab was built here, nothing to remove"; fi

.PHONY: lint
lint: ## Formatting, clippy, and the repository's own rules
	@if cargo fmt --version >/dev/null 2>&1; then cargo fmt --all --check; \
	else echo "lint: SKIPPED rustfmt (this Rust comes without it)"; fi
	@if cargo clippy --version >/dev/null 2>&1; then cargo clippy --workspace --all-targets -- -D warnings; \
	else echo "lint: SKIPPED clippy (this Rust comes without it)"; fi
	@if cargo deny --version >/dev/null 2>&1; then cargo deny check bans licenses sources; \
	else echo "lint: SKIPPED cargo-deny (not installed); its rules are in deny.toml"; fi

.PHONY: deps
deps: ## Install what building and testing need (Debian packages; Rust must be there)
	@tests/deps.sh
