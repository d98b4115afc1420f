//! vCPUs: their state at power-on, their threads, and the gate that pauses and stops them.
//!
//! One thread per vCPU runs [`run`] until the gate closes for good or the guest's end is known.
//! Everything that the guest touches and KVM does not serve comes through here to the
//! [`Bus`](crate::bus::Bus), on the thread of the vCPU that touched it.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use kvm_bindings::{CpuId, kvm_cpuid_entry2, kvm_regs};
use kvm_ioctls::VcpuExit;
use sepal_protocol::vm::ExitCause;

use crate::boot::Entry;
use crate::bus::Bus;
use crate::exit::Exit;
use crate::kvm::{self, RunningVcpu, Vcpu};
use crate::launcher::Launcher;
use crate::{jail, seccomp};

/// IA32_MISC_ENABLE: fast string operations on.
const MSR_MISC_ENABLE: (u32, u64) = (0x1a0, 1);
/// IA32_MTRR_DEF_TYPE: enabled, everything write-back. With MTRRs off all memory is uncacheable.
const MSR_MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 1 << 11 | 6);

/// Offsets into the local APIC's registers (Intel SDM 3A, table 11-1).
const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
/// Delivery modes of a local vector.
const MODE_EXTINT: u32 = 7 << 8;
const MODE_NMI: u32 = 4 << 8;

/// CPUID.1:ECX.
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// CPUID.1:EDX: CPUID.1:EBX[23:16] counts logical processors.
const HTT: u32 = 1 << 28;

/// Brings a vCPU to the state that the kernel expects at `entry`; without one it waits for the
/// boot CPU's INIT and SIPI.
///
/// # Errors
/// What KVM refuses and the guest cannot do without.
pub fn configure(
    vcpu: &Vcpu,
    supported: &CpuId,
    count: u8,
    entry: Option<&Entry>,
) -> Result<(), kvm::Error> {
    let mut cpuid = supported.clone();
    for leaf in cpuid.as_mut_slice() {
        adapt_cpuid(leaf, vcpu.id(), count);
    }
    if let Err(error) = vcpu.set_cpuid(&cpuid) {
        // A deprivileged guest executes CPUID natively, so nothing is lost with the table.
        tracing::warn!(%error, "KVM does not take our CPUID");
    }
    for (index, value) in [MSR_MISC_ENABLE, MSR_MTRR_DEF_TYPE] {
        if !vcpu.set_msr(index, value) {
            tracing::debug!(msr = format_args!("{index:#x}"), "KVM refuses an MSR");
        }
    }
    let mut lapic = vcpu.lapic()?;
    let Some(entry) = entry else {
        // KVM finds CPUs by a map that it renews when an APIC is set, not yet when one is made: a CPU
        // that comes later would never hear of its INIT.
        return vcpu.set_lapic(&lapic);
    };

    // Legacy interrupts and NMI on the boot CPU's pins, as firmware leaves them (Intel MP
    // specification, 3.6.2.2). Others keep theirs masked.
    set_lvt_mode(&mut lapic.regs, APIC_LVT_LINT0, MODE_EXTINT);
    set_lvt_mode(&mut lapic.regs, APIC_LVT_LINT1, MODE_NMI);
    vcpu.set_lapic(&lapic)?;

    let mut sregs = vcpu.sregs()?;
    entry.apply(&mut sregs);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        // Bit 1 is always one; interrupts are off.
        rflags: 2,
        rip: entry.rip,
        rsi: entry.zero_page,
        ..Default::default()
    })
}

/// How many bits a guest-physical address has (CPUID.80000008H:EAX). A CPU that does not tell has 36.
pub fn address_bits(supported: &CpuId) -> u32 {
    let leaf = supported
        .as_slice()
        .iter()
        .find(|leaf| leaf.function == 0x8000_0008);
    leaf.map_or(36, |leaf| leaf.eax & 0xff)
}

fn set_lvt_mode(regs: &mut [libc::c_char], offset: usize, mode: u32) {
    for (reg, byte) in regs[offset..offset + 4].iter_mut().zip(mode.to_le_bytes()) {
        *reg = byte as libc::c_char;
    }
}

/// One package of `count` cores without hyper-threads, and the core's own id in it.
fn adapt_cpuid(leaf: &mut kvm_cpuid_entry2, id: u8, count: u8) {
    let id = u32::from(id);
    let cores = u32::from(count);
    // Bits of an APIC id that tell the cores of the package apart.
    let width = cores.next_power_of_two().trailing_zeros();
    match (leaf.function, leaf.index) {
        (0x1, _) => {
            let logical = if cores > 1 {
                cores.next_power_of_two()
            } else {
                0
            };
            leaf.ebx = leaf.ebx & 0xffff | logical << 16 | id << 24;
            leaf.ecx |= TSC_DEADLINE | HYPERVISOR;
            leaf.edx = if cores > 1 {
                leaf.edx | HTT
            } else {
                leaf.edx & !HTT
            };
        }
        // Deterministic cache parameters: caches of levels 1 and 2 belong to one core, level 3 to
        // all of them.
        (0x4, _) if leaf.eax & 0x1f != 0 => {
            let shared = if leaf.eax >> 5 & 7 >= 3 {
                cores.next_power_of_two() - 1
            } else {
                0
            };
            let package = cores.next_power_of_two() - 1;
            leaf.eax = leaf.eax & 0x3fff | shared << 14 | package << 26;
        }
        // No performance counters: nothing of them is virtualized.
        (0xa, _) => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
        // Extended topology: level 0 are threads, level 1 cores.
        (0xb | 0x1f, level) => {
            let (shift, number, kind) = match level {
                0 => (0, 1, 1),
                1 => (width, cores, 2),
                _ => (0, 0, 0),
            };
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (shift, number, level | kind << 8, id);
        }
        // AMD: number of cores and the width of their ids.
        (0x8000_0008, _) => leaf.ecx = leaf.ecx & !0xf0ff | width << 12 | (cores - 1),
        // AMD: APIC id, core id, node id.
        (0x8000_001e, _) => (leaf.eax, leaf.ebx, leaf.ecx) = (id, id & 0xff, 0),
        _ => {}
    }
}

#[derive(Default)]
struct GateState {
    paused: bool,
    stopped: bool,
    /// vCPU threads that are in the guest or will enter it.
    inside: usize,
}

/// What vCPUs pass before they enter the guest.
#[derive(Default)]
pub struct Gate {
    state: Mutex<GateState>,
    /// True while `paused` or `stopped`: spares the lock on every entry to the guest.
    closed: AtomicBool,
    changed: Condvar,
}

impl Gate {
    /// Blocks while paused; false if the vCPU must end.
    fn pass(&self) -> bool {
        if !self.closed.load(Ordering::SeqCst) {
            return true;
        }
        let mut state = self.lock();
        state.inside -= 1;
        self.changed.notify_all();
        while state.paused && !state.stopped {
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        state.inside += 1;
        !state.stopped
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// All vCPU threads of the VM.
pub struct Vcpus {
    gate: Arc<Gate>,
    bus: Arc<Bus>,
    exit: Arc<Exit>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// Starts a thread for each of `vcpus`. They wait for [`Vcpus::resume`]: whoever starts them has
    /// something to do before there is a guest.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn start(vcpus: Vec<Vcpu>, bus: &Arc<Bus>, exit: &Arc<Exit>) -> io::Result<Self> {
        let gate = Gate::default();
        gate.lock().paused = true;
        gate.closed.store(true, Ordering::SeqCst);
        let mut all = Self {
            gate: Arc::new(gate),
            bus: bus.clone(),
            exit: exit.clone(),
            threads: Vec::with_capacity(vcpus.len()),
        };
        for vcpu in vcpus {
            match start(vcpu, all.gate.clone(), bus.clone(), exit.clone()) {
                Ok(thread) => all.threads.push(thread),
                Err(error) => {
                    all.stop();
                    return Err(error);
                }
            }
        }
        Ok(all)
    }

    /// Adds one to those that run. The launcher's thread starts it: this one may not start any.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn add(&mut self, vcpu: Vcpu, launcher: &Launcher) -> io::Result<()> {
        let (gate, bus, exit) = (self.gate.clone(), self.bus.clone(), self.exit.clone());
        let started = launcher.call(move || start(vcpu, gate, bus, exit));
        self.threads.push(started.map_err(io::Error::other)??);
        Ok(())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// Returns when no vCPU executes guest code any more.
    pub fn pause(&self) {
        let mut state = self.gate.lock();
        state.paused = true;
        self.close_and_wait(state);
    }

    /// Lets all vCPUs go on.
    pub fn resume(&self) {
        let mut state = self.gate.lock();
        state.paused = false;
        self.gate.closed.store(state.stopped, Ordering::SeqCst);
        self.gate.changed.notify_all();
    }

    /// Whether vCPUs are paused.
    pub fn paused(&self) -> bool {
        self.gate.lock().paused
    }

    /// Ends all vCPU threads.
    pub fn stop(&mut self) {
        let mut state = self.gate.lock();
        state.stopped = true;
        self.gate.changed.notify_all();
        self.close_and_wait(state);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a vCPU thread panicked");
            }
        }
    }

    fn close_and_wait(&self, mut state: MutexGuard<'_, GateState>) {
        self.gate.closed.store(true, Ordering::SeqCst);
        self.threads.iter().for_each(kvm::kick);
        while state.inside > 0 {
            state = self
                .gate
                .changed
                .wait(state)
                .unwrap_or_else(|e| e.into_inner());
        }
    }
}

/// Starts the thread of a vCPU.
fn start(
    vcpu: Vcpu,
    gate: Arc<Gate>,
    bus: Arc<Bus>,
    exit: Arc<Exit>,
) -> io::Result<JoinHandle<()>> {
    let theirs = gate.clone();
    gate.lock().inside += 1;
    let thread = std::thread::Builder::new()
        .name(format!("vcpu{}", vcpu.id()))
        .stack_size(256 * 1024)
        .spawn(move || {
            let gate = theirs;
            if let Err(error) = jail::confine_thread(seccomp::Thread::Vcpu) {
                exit.end(
                    ExitCause::Internal,
                    format!("cannot confine a vCPU: {error}"),
                );
            } else {
                // The panic hook reports it; without a vCPU the VM would only hang.
                let run = AssertUnwindSafe(|| run(vcpu, &gate, &bus, &exit));
                if catch_unwind(run).is_err() {
                    exit.end(ExitCause::Internal, "a vCPU's thread panicked");
                }
            }
            gate.lock().inside -= 1;
            gate.changed.notify_all();
        });
    if thread.is_err() {
        gate.lock().inside -= 1;
    }
    thread
}

/// Counts of what one vCPU left the guest for, told when it ends: the next saving at start-up.
#[derive(Debug, Default)]
struct Exits {
    io: u64,
    mmio: u64,
    kicks: u64,
}

fn run(vcpu: Vcpu, gate: &Gate, bus: &Bus, exit: &Exit) {
    let id = vcpu.id();
    let mut vcpu = vcpu.on_this_thread();
    let mut exits = Exits::default();
    let end = loop {
        vcpu.forget_kicks();
        if !gate.pass() {
            break None;
        }
        match vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                exits.io += 1;
                bus.port_read(port, data);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                exits.io += 1;
                bus.port_write(port, data);
            }
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                exits.mmio += 1;
                bus.read(gpa, data);
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                exits.mmio += 1;
                bus.write(gpa, data);
            }
            Ok(VcpuExit::Intr) => exits.kicks += 1,
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => exits.kicks += 1,
            Ok(VcpuExit::Shutdown) => {
                let text = "the guest met a fault that it could not handle (triple fault)";
                break Some(text.to_owned());
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                break Some(format!(
                    "the CPU refused the guest's state ({reason:#x}, CPU {cpu})"
                ));
            }
            Ok(VcpuExit::InternalError) => {
                let suberror = vcpu.internal_suberror();
                break Some(format!(
                    "KVM cannot go on with the guest (suberror {suberror})"
                ));
            }
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                break Some(format!("KVM reports system event {kind}"));
            }
            Ok(other) => break Some(format!("KVM left the guest with {other:?}")),
            Err(error) => break Some(format!("KVM_RUN failed: {error}")),
        }
    };
    tracing::debug!(vcpu = id, ?exits, "vCPU ends");
    if let Some(message) = end {
        log_registers(id, &vcpu);
        exit.end(ExitCause::GuestCrash, message);
    }
}

fn log_registers(id: u8, vcpu: &RunningVcpu) {
    if let Some((regs, sregs)) = vcpu.registers() {
        tracing::warn!(
            vcpu = id,
            rip = format_args!("{:#x}", regs.rip),
            rsp = format_args!("{:#x}", regs.rsp),
            cr0 = format_args!("{:#x}", sregs.cr0),
            cr2 = format_args!("{:#x}", sregs.cr2),
            cr3 = format_args!("{:#x}", sregs.cr3),
            cr4 = format_args!("{:#x}", sregs.cr4),
            efer = format_args!("{:#x}", sregs.efer),
            "guest crash"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            ebx: 0x12345678,
            ..Default::default()
        }
    }

    #[test]
    fn every_cpu_finds_itself_in_one_package() {
        let mut basic = leaf(1, 0);
        adapt_cpuid(&mut basic, 2, 3);
        assert_eq!(basic.ebx, 0x0204_5678);
        assert_ne!(basic.ecx & HYPERVISOR, 0);

        let mut cores = leaf(0xb, 1);
        adapt_cpuid(&mut cores, 2, 3);
        assert_eq!(
            (cores.eax, cores.ebx, cores.ecx, cores.edx),
            (2, 3, 0x201, 2)
        );
    }

    #[test]
    fn a_single_cpu_has_no_siblings() {
        let mut basic = leaf(1, 0);
        basic.edx = HTT;
        adapt_cpuid(&mut basic, 0, 1);
        assert_eq!(basic.edx & HTT, 0);
        let mut amd = leaf(0x8000_0008, 0);
        adapt_cpuid(&mut amd, 0, 1);
        assert_eq!(amd.ecx, 0);
    }
}
