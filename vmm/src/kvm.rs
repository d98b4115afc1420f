//! KVM: every ioctl of the VMM, wrapped so that callers cannot misuse it.
//!
//! [`Host`] is /dev/kvm, [`Machine`] a VM with its memory slots, interrupt routes and doorbells,
//! [`Vcpu`] a virtual CPU that becomes a [`RunningVcpu`] on the thread that runs it.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC,
    KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, KvmIrqRouting, Msrs, kvm_irq_routing_entry,
    kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_run, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuExit, VcpuFd, VmFd};
use sepal_protocol::vm::KvmFlavour;
use vm_memory::MmapRegion;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::{ConfigPages, ECAM_SIZE, KVM_IDENTITY_MAP, KVM_TSS};
use crate::virtio::pmem::Image;

/// Where KVM is found.
pub const DEVICE: &str = "/dev/kvm";
/// Answers [`DEPRIVILEGED_SIGNATURE`] where KVM runs guests deprivileged.
const MSR_DEPRIVILEGED: u32 = 0x4b56_4d11;
/// "PVM".
const DEPRIVILEGED_SIGNATURE: u64 = 0x4d_5650;
/// Feature mask of a deprivileged KVM, and its TSC frequency in kHz.
const MSRS_DEPRIVILEGED: [u32; 3] = [MSR_DEPRIVILEGED, 0x4b56_4d12, 0x4b56_4d13];
/// Inputs of KVM's I/O APIC; message-signalled interrupts get the numbers behind them.
const IOAPIC_PINS: u32 = 24;

/// Why KVM does not do what we need.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// open(2) failed.
    #[error(
        "cannot open {DEVICE}: {0}; enable virtualization on this host, load kvm_intel or \
         kvm_amd, and give this user access to {DEVICE}"
    )]
    Open(kvm_ioctls::Error),
    /// Not the KVM of the last two decades.
    #[error("{DEVICE} has API version {0}, Sepal needs {KVM_API_VERSION}")]
    Version(i32),
    /// A capability is missing.
    #[error("KVM on this host lacks {0}; a Linux kernel of version 4.14 or later has it")]
    Capability(&'static str),
    /// An ioctl failed.
    #[error("KVM: {call} failed: {reason}")]
    Ioctl {
        /// Which.
        call: &'static str,
        /// The kernel's answer.
        reason: kvm_ioctls::Error,
    },
}

/// Names the ioctl in the error.
fn ioctl(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |reason| Error::Ioctl { call, reason }
}

/// KVM of this host.
pub struct Host {
    kvm: Kvm,
}

impl Host {
    /// Opens /dev/kvm and checks that it can do what we need.
    ///
    /// # Errors
    /// No KVM, or not enough of it.
    pub fn open() -> Result<Self, Error> {
        let kvm = Kvm::new().map_err(Error::Open)?;
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(Error::Version(version));
        }
        let needed = [
            (Cap::Irqchip, "an in-kernel interrupt controller"),
            (Cap::Irqfd, "irqfd"),
            (Cap::Ioeventfd, "ioeventfd"),
            (Cap::UserMemory, "user memory"),
            (Cap::SignalMsi, "message-signalled interrupts"),
            (Cap::ImmediateExit, "immediate exit"),
            (Cap::ReadonlyMem, "read-only memory"),
        ];
        for (capability, name) in needed {
            if !kvm.check_extension(capability) {
                return Err(Error::Capability(name));
            }
        }
        Ok(Self { kvm })
    }

    /// KVM's API version.
    pub fn version(&self) -> i32 {
        self.kvm.get_api_version()
    }

    /// The most vCPUs of one VM.
    pub fn max_vcpus(&self) -> usize {
        self.kvm.get_max_vcpus()
    }

    /// What KVM lets a guest's CPUID say.
    ///
    /// # Errors
    /// The ioctl's.
    pub fn supported_cpuid(&self) -> Result<CpuId, Error> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(ioctl("KVM_GET_SUPPORTED_CPUID"))
    }

    /// Makes an empty VM with its interrupt controllers.
    ///
    /// # Errors
    /// The ioctl's.
    pub fn create_machine(&self) -> Result<Machine, Error> {
        // EINTR: a signal while the kernel starts its helper threads; try again (kvm api, 4.2).
        let vm = loop {
            match self.kvm.create_vm() {
                Err(e) if e.errno() == libc::EINTR => continue,
                other => break other.map_err(ioctl("KVM_CREATE_VM"))?,
            }
        };
        vm.set_tss_address(KVM_TSS as usize)
            .map_err(ioctl("KVM_SET_TSS_ADDR"))?;
        vm.set_identity_map_address(KVM_IDENTITY_MAP)
            .map_err(ioctl("KVM_SET_IDENTITY_MAP_ADDR"))?;
        vm.create_irq_chip().map_err(ioctl("KVM_CREATE_IRQCHIP"))?;
        Ok(Machine {
            vm,
            slots: Mutex::default(),
            routes: Mutex::new(Routes::default()),
        })
    }
}

/// A message-signalled interrupt (PCI Express 5.0, 6.1.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Msi {
    /// Where the device would write.
    pub address: u64,
    /// What it would write.
    pub data: u32,
}

struct Routes {
    messages: BTreeMap<u32, Msi>,
    next: u32,
    /// Numbers that were handed out and given back.
    free: Vec<u32>,
}

impl Default for Routes {
    fn default() -> Self {
        Self {
            messages: BTreeMap::new(),
            next: IOAPIC_PINS,
            free: Vec::new(),
        }
    }
}

/// What a memory slot shows the guest. KVM's slot holds it, so that the mapping outlives its use.
#[derive(Clone)]
pub enum Backing {
    /// Guest RAM, writable.
    Ram(Arc<MmapRegion>),
    /// A part of a mapping, as RAM: at which offset, and its bytes.
    Part(Arc<MmapRegion>, u64, u64),
    /// A file of the host that the guest may only read.
    Image(Arc<Image>),
    /// Configuration space, which the guest reads as memory and writes by leaving to us.
    Config(Arc<ConfigPages>),
}

/// A memory slot that can be taken away again.
#[derive(Debug, PartialEq, Eq)]
pub struct SlotId(pub u32);

/// A VM.
pub struct Machine {
    vm: VmFd,
    slots: Mutex<Vec<Option<Backing>>>,
    routes: Mutex<Routes>,
}

impl Machine {
    /// Shows the guest `backing` at `gpa`.
    ///
    /// # Errors
    /// The range overlaps another, or KVM has no slot left.
    pub fn add_memory(&self, gpa: u64, backing: Backing) -> Result<SlotId, Error> {
        let (flags, address, size) = match &backing {
            Backing::Ram(region) => (0, region.as_ptr() as u64, region.size() as u64),
            Backing::Part(region, offset, size) => {
                let end = offset.checked_add(*size);
                if end.is_none_or(|end| end > region.size() as u64) {
                    let beyond = kvm_ioctls::Error::new(libc::EINVAL);
                    return Err(ioctl("KVM_SET_USER_MEMORY_REGION")(beyond));
                }
                (0, region.as_ptr() as u64 + offset, *size)
            }
            Backing::Image(image) => (KVM_MEM_READONLY, image.host_address(), image.size()),
            Backing::Config(pages) => (KVM_MEM_READONLY, pages.host_address(), ECAM_SIZE),
        };
        let mut slots = lock(&self.slots);
        let free = slots.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            slots.push(None);
            slots.len() - 1
        });
        let slot = kvm_userspace_memory_region {
            slot: index as u32,
            flags,
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: address,
        };
        // SAFETY: the range is one live mapping or lies within one, which `slots` keeps alive as long
        // as the VM. What the guest does to it is seen only through volatile accesses.
        unsafe { self.vm.set_user_memory_region(slot) }
            .map_err(ioctl("KVM_SET_USER_MEMORY_REGION"))?;
        slots[index] = Some(backing);
        Ok(SlotId(index as u32))
    }

    /// Takes memory away from the guest.
    ///
    /// # Errors
    /// The ioctl's; the slot then stays.
    pub fn remove_memory(&self, slot: &SlotId) -> Result<(), Error> {
        let mut slots = lock(&self.slots);
        let gone = kvm_userspace_memory_region {
            slot: slot.0,
            ..Default::default()
        };
        // SAFETY: a size of zero deletes the slot; KVM then no longer uses its mapping.
        unsafe { self.vm.set_user_memory_region(gone) }
            .map_err(ioctl("KVM_SET_USER_MEMORY_REGION"))?;
        if let Some(place) = slots.get_mut(slot.0 as usize) {
            *place = None;
        }
        Ok(())
    }

    /// Makes the vCPU with this APIC id.
    ///
    /// # Errors
    /// The ioctl's.
    pub fn create_vcpu(&self, id: u8) -> Result<Vcpu, Error> {
        let fd = self
            .vm
            .create_vcpu(id.into())
            .map_err(ioctl("KVM_CREATE_VCPU"))?;
        Ok(Vcpu { fd, id })
    }

    /// Connects an eventfd to an edge-triggered input of the I/O APIC.
    ///
    /// # Errors
    /// The ioctl's.
    pub fn connect_pin(&self, event: &EventFd, pin: u32) -> Result<(), Error> {
        self.vm
            .register_irqfd(event, pin)
            .map_err(ioctl("KVM_IRQFD"))
    }

    /// Hands out an interrupt number for a message-signalled interrupt.
    pub fn allocate_gsi(&self) -> u32 {
        let mut routes = lock(&self.routes);
        if let Some(gsi) = routes.free.pop() {
            return gsi;
        }
        let gsi = routes.next;
        routes.next += 1;
        gsi
    }

    /// Takes a number back that nothing is connected to any more.
    pub fn free_gsi(&self, gsi: u32) {
        let mut routes = lock(&self.routes);
        // KVM forgets the message when it is told of the next one.
        routes.messages.remove(&gsi);
        routes.free.push(gsi);
    }

    /// Says which message `gsi` stands for.
    ///
    /// # Errors
    /// The ioctl's.
    pub fn route(&self, gsi: u32, msi: Msi) -> Result<(), Error> {
        let mut routes = lock(&self.routes);
        if routes.messages.get(&gsi) == Some(&msi) {
            return Ok(());
        }
        let before = routes.messages.insert(gsi, msi);
        let done = self.set_routes(&routes);
        if done.is_err() {
            match before {
                Some(msi) => routes.messages.insert(gsi, msi),
                None => routes.messages.remove(&gsi),
            };
        }
        done
    }

    fn set_routes(&self, routes: &Routes) -> Result<(), Error> {
        let mut entries: Vec<_> = (0..IOAPIC_PINS).map(pin_route).collect();
        entries.extend(
            routes
                .messages
                .iter()
                .map(|(gsi, msi)| msi_route(*gsi, *msi)),
        );
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| ioctl("KVM_SET_GSI_ROUTING")(kvm_ioctls::Error::new(libc::ENOSPC)))?;
        self.vm
            .set_gsi_routing(&table)
            .map_err(ioctl("KVM_SET_GSI_ROUTING"))
    }

    /// Raises `gsi` whenever `event` is written to. One written to before counts.
    ///
    /// # Errors
    /// The ioctl's.
    pub fn connect(&self, event: &EventFd, gsi: u32) -> Result<(), Error> {
        self.vm
            .register_irqfd(event, gsi)
            .map_err(ioctl("KVM_IRQFD"))
    }

    /// Ends [`Machine::connect`]; `event` remembers what is written to it from now on.
    ///
    /// # Errors
    /// The ioctl's.
    pub fn disconnect(&self, event: &EventFd, gsi: u32) -> Result<(), Error> {
        self.vm
            .unregister_irqfd(event, gsi)
            .map_err(ioctl("KVM_IRQFD"))
    }

    /// Writes to `event` whenever the guest writes to `gpa`, whatever the value and its width.
    ///
    /// # Errors
    /// The ioctl's.
    pub fn add_doorbell(&self, gpa: u64, event: &EventFd) -> Result<(), Error> {
        self.vm
            .register_ioevent(event, &IoEventAddress::Mmio(gpa), NoDatamatch)
            .map_err(ioctl("KVM_IOEVENTFD"))
    }

    /// Ends [`Machine::add_doorbell`].
    ///
    /// # Errors
    /// The ioctl's.
    pub fn remove_doorbell(&self, gpa: u64, event: &EventFd) -> Result<(), Error> {
        self.vm
            .unregister_ioevent(event, &IoEventAddress::Mmio(gpa), NoDatamatch)
            .map_err(ioctl("KVM_IOEVENTFD"))
    }
}

fn pin_route(pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: pin,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
    entry.u.irqchip.pin = pin;
    entry
}

fn msi_route(gsi: u32, msi: Msi) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = msi.address as u32;
    entry.u.msi.address_hi = (msi.address >> 32) as u32;
    entry.u.msi.data = msi.data;
    entry
}

/// A vCPU that does not run yet.
pub struct Vcpu {
    fd: VcpuFd,
    id: u8,
}

impl Vcpu {
    /// Its APIC id.
    pub fn id(&self) -> u8 {
        self.id
    }

    /// Which KVM this is. Only a vCPU can tell.
    pub fn flavour(&self) -> KvmFlavour {
        match self.get_msr(MSR_DEPRIVILEGED) {
            Some(DEPRIVILEGED_SIGNATURE) => KvmFlavour::Deprivileged,
            _ => KvmFlavour::Hardware,
        }
    }

    /// The MSRs by which a deprivileged KVM tells of itself, for `--probe`.
    pub fn deprivileged_msrs(&self) -> Vec<(u32, Option<u64>)> {
        MSRS_DEPRIVILEGED
            .iter()
            .map(|msr| (*msr, self.get_msr(*msr)))
            .collect()
    }

    fn get_msr(&self, index: u32) -> Option<u64> {
        let entry = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let mut msrs = Msrs::from_entries(&[entry]).ok()?;
        match self.fd.get_msrs(&mut msrs) {
            Ok(1) => msrs.as_slice().first().map(|entry| entry.data),
            _ => None,
        }
    }

    /// Sets an MSR; false if KVM refuses it.
    pub fn set_msr(&self, index: u32, data: u64) -> bool {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        match Msrs::from_entries(&[entry]) {
            Ok(msrs) => matches!(self.fd.set_msrs(&msrs), Ok(1)),
            Err(_) => false,
        }
    }

    /// # Errors
    /// The ioctl's.
    pub fn set_cpuid(&self, cpuid: &CpuId) -> Result<(), Error> {
        self.fd.set_cpuid2(cpuid).map_err(ioctl("KVM_SET_CPUID2"))
    }

    /// # Errors
    /// The ioctl's.
    pub fn sregs(&self) -> Result<kvm_sregs, Error> {
        self.fd.get_sregs().map_err(ioctl("KVM_GET_SREGS"))
    }

    /// # Errors
    /// The ioctl's.
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), Error> {
        self.fd.set_sregs(sregs).map_err(ioctl("KVM_SET_SREGS"))
    }

    /// # Errors
    /// The ioctl's.
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<(), Error> {
        self.fd.set_regs(regs).map_err(ioctl("KVM_SET_REGS"))
    }

    /// # Errors
    /// The ioctl's.
    pub fn lapic(&self) -> Result<kvm_lapic_state, Error> {
        self.fd.get_lapic().map_err(ioctl("KVM_GET_LAPIC"))
    }

    /// # Errors
    /// The ioctl's.
    pub fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<(), Error> {
        self.fd.set_lapic(lapic).map_err(ioctl("KVM_SET_LAPIC"))
    }

    /// Binds the vCPU to the calling thread, which may from now on be kicked.
    pub fn on_this_thread(mut self) -> RunningVcpu {
        let run: *mut kvm_run = self.fd.get_kvm_run();
        // SAFETY: `run` points to KVM's page for this vCPU, mapped as long as `self.fd` lives.
        // The field is one byte that the kernel only reads.
        let immediate_exit = unsafe { &raw mut (*run).immediate_exit };
        IMMEDIATE_EXIT.set(immediate_exit);
        RunningVcpu {
            fd: self.fd,
            immediate_exit,
            _this_thread: PhantomData,
        }
    }
}

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs, for the signal handler.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// A vCPU on its thread.
pub struct RunningVcpu {
    fd: VcpuFd,
    immediate_exit: *mut u8,
    _this_thread: PhantomData<*const ()>,
}

impl RunningVcpu {
    /// Runs the guest until it needs something. EINTR: the thread was kicked.
    ///
    /// # Errors
    /// KVM_RUN's.
    pub fn run(&mut self) -> Result<VcpuExit<'_>, kvm_ioctls::Error> {
        self.fd.run()
    }

    /// Forgets kicks up to now. The caller looks afterwards at whatever a kick may have announced,
    /// so that none is lost: one that comes after that look ends the next [`RunningVcpu::run`] at
    /// once.
    pub fn forget_kicks(&mut self) {
        immediate_exit(self.immediate_exit).store(0, Ordering::SeqCst);
    }

    /// Registers for a crash report; `None` if KVM does not tell.
    pub fn registers(&self) -> Option<(kvm_regs, kvm_sregs)> {
        Some((self.fd.get_regs().ok()?, self.fd.get_sregs().ok()?))
    }

    /// `suberror` of an internal error of KVM.
    pub fn internal_suberror(&mut self) -> u32 {
        let run = self.fd.get_kvm_run();
        // SAFETY: after KVM_EXIT_INTERNAL_ERROR this is the member of the union that KVM has
        // filled, and it is plain data for any bit pattern.
        unsafe { run.__bindgen_anon_1.internal.suberror }
    }
}

impl Drop for RunningVcpu {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

fn immediate_exit<'a>(field: *mut u8) -> &'a AtomicU8 {
    // SAFETY: callers pass the address of a live vCPU's field, which is aligned as any byte is
    // and accessed only through this function.
    unsafe { AtomicU8::from_ptr(field) }
}

extern "C" fn on_kick(_signal: libc::c_int) {
    // Only a load and a store: async-signal-safe. The thread-local has neither a lazy initializer
    // nor a destructor.
    let field = IMMEDIATE_EXIT.get();
    if !field.is_null() {
        immediate_exit(field).store(1, Ordering::SeqCst);
    }
}

/// The signal that kicks vCPU threads out of KVM_RUN.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Makes kicks possible in this process.
///
/// # Errors
/// sigaction(2)'s.
pub fn install_kick_handler() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is valid; the handler is async-signal-safe (see there).
    let done = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_kick as *const () as libc::sighandler_t;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(kick_signal(), &action, ptr::null_mut())
    };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Kicks a vCPU thread: its present or next KVM_RUN ends with EINTR.
pub fn kick<T>(thread: &JoinHandle<T>) {
    use std::os::unix::thread::JoinHandleExt;
    // SAFETY: the handle has not been joined, so the thread id is valid even if the thread has
    // ended.
    let done = unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
    // ESRCH: it has ended, as we want.
    if done != 0 && done != libc::ESRCH {
        tracing::error!(error = %io::Error::from_raw_os_error(done), "cannot kick a vCPU thread");
    }
}

impl AsRawFd for Machine {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.vm.as_raw_fd()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
