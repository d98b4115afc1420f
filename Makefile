# Sepal: build, show, test and measure. Each target works on a fresh Debian 12 machine as root;
# what is expensive (guest kernels, test tools, images) is cached in SEPAL_CACHE by its inputs.

SHELL := /bin/bash
.DEFAULT_GOAL := build

CARGO_TARGET_DIR ?= $(CURDIR)/target
export CARGO_TARGET_DIR
export SEPAL_CACHE ?= /var/cache/sepal
# Guest kernels to build: hardware, deprivileged or all.
KERNELS ?= all
BIN := $(CARGO_TARGET_DIR)/x86_64-unknown-linux-gnu/release

.PHONY: build programs kernel image deps lint miri unit fuzz e2e-native e2e-node test test-kubernetes demo bench soak hostile faults install node-image clean

## build: programs, guest kernels and guest image
build: programs kernel image

deps:
	tests/install-deps

programs: deps
	cargo build --release --workspace --exclude sepal-tests --exclude sepal-fuzz

kernel: deps
	kernel-config/build $(KERNELS)

# The agent of this build: cargo would build another for a single crate's choice of features.
image: programs
	rootfs/build --agent $(BIN)/sepal-agent all

## install: put what was built under /opt/sepal and the shim on containerd's PATH
install: build
	deploy/install --bin $(BIN)

## node-image: the image that installs Sepal on Kubernetes' nodes, as an OCI archive
node-image: build
	deploy/node/image --bin $(BIN)

## demo: a Debian container and an nginx pod in microVMs, on this machine
demo: build
	tests/demo

lint: deps
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --features sepal-vmm/breach,sepal-fs/breach,sepal-shim/faults,sepal-agent/faults -- -D warnings
	tests/tools/cargo-deny check bans licenses sources
	tests/tools/unsafe-list

unit: deps
	cargo test --workspace --exclude sepal-tests
	cargo test -p sepal-vmm --features breach --test breach
	cargo test -p sepal-fs --features breach --test breach

## miri: unsafe code that needs no system call, watched by Miri
miri:
	tests/miri

## fuzz: long runs of a fuzz target (make fuzz T=vsock FOR=3600), or of all, one after the other
fuzz: deps
	fuzz/run $(or $(T),all) $(FOR)

## test: everything: lint, unit tests, end-to-end tests in the beds this machine can do
test:
	tests/run-all

## test-kubernetes: pods by Kubernetes' own control plane and kubelet, on Sepal and, as a control, on runc
test-kubernetes: build
	tests/kube/run native --runtime-class runc
	tests/kube/run native

## bench: start-up, memory, file and network figures side by side with runc; writes JSON
bench: build
	tests/bench/run

## hostile: pods and guests that do their worst, to what is theirs and to each device, beside a pod that is asked
hostile: build
	tests/hostile/neighbours
	tests/hostile/run $(FOR)

## soak: thousands of containers and an hour of CRI calls chosen by chance; shows what grows
soak: build
	tests/soak/run $(CYCLES) $(SECONDS_OF_CALLS)

## faults: every process of a pod hurt at every point of the pod's life
faults: build
	tests/faults/run native

clean:
	cargo clean
