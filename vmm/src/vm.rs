//! The life of a VM, top to bottom.
//!
//! [`Prepared`] is what can be had before anyone has said what to boot: the shim spawns the VMM
//! first and looks at the pod's network meanwhile. [`boot`] turns it into a running [`Vm`]: RAM,
//! then the kernel on one thread and the devices on another, then the vCPUs.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, anyhow, bail};
use kvm_bindings::CpuId;
use sepal_protocol::ports::GUEST_CID;
use sepal_protocol::vm::{BlkSpec, ExitCause, FdIndex, KernelSpec, KvmFlavour, NetSpec, VmSpec};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::boot::{self, Kernel, Source};
use crate::bus::Bus;
use crate::clock::{self, Stages};
use crate::exit::Exit;
use crate::kvm::{self, Backing, Host, Machine, Vcpu};
use crate::launcher::Launcher;
use crate::memory::{LOW_RAM_END, Layout, MMIO64_SIZE, Ram, RamFile};
use crate::pci::virtio::VirtioPci;
use crate::pci::{self, PciBus};
use crate::platform::{EVENT_PIN, Platform};
use crate::reserve::Reserve;
use crate::serial::Serial;
use crate::size::Size;
use crate::vcpu::{self, Vcpus};
use crate::virtio::balloon::{self, Balloon};
use crate::virtio::blk::Blk;
use crate::virtio::console::{Console, Log};
use crate::virtio::device::VirtioDevice;
use crate::virtio::fs::Fs;
use crate::virtio::net::Net;
use crate::virtio::pmem::{self, Image, Pmem};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;
use crate::virtio::worker;
use crate::{acpi, cmdline, jail, seccomp, sys};

/// One request queue: the file server has one thread to serve it.
const FS_REQUEST_QUEUES: u16 = 1;

/// What is ready before the specification comes.
pub struct Prepared {
    machine: Arc<Machine>,
    boot_cpu: Vcpu,
    cpuid: CpuId,
    max_cpus: usize,
    preloaded: Option<Preloaded>,
    /// The KVM found.
    pub flavour: KvmFlavour,
}

/// A kernel that lies in RAM before the rest is known.
struct Preloaded {
    path: PathBuf,
    kernel: Kernel,
    ram: RamFile,
}

impl Prepared {
    /// Opens /dev/kvm and makes a VM with its first vCPU.
    ///
    /// # Errors
    /// No usable KVM on this host.
    pub fn new() -> Result<Self, kvm::Error> {
        let host = Host::open()?;
        let machine = host.create_machine()?;
        let boot_cpu = machine.create_vcpu(0)?;
        Ok(Self {
            cpuid: host.supported_cpuid()?,
            max_cpus: host.max_vcpus(),
            preloaded: None,
            flavour: boot_cpu.flavour(),
            machine: Arc::new(machine),
            boot_cpu,
        })
    }
}

impl Prepared {
    /// Loads the one of `kernels` that fits, so that it is there when the specification comes and
    /// names the same. Whatever is wrong with it is told then.
    pub fn preload(&mut self, kernels: &KernelSpec) {
        let load = || -> Result<Preloaded> {
            let path = kernel_for(kernels, self.flavour)?.to_owned();
            let ram = RamFile::new(false)?;
            let source = Source::kernel(&path)?;
            let layout = Layout::new(LOW_RAM_END)?;
            let kernel = boot::load_kernel(source, ram.target(), &layout, true)?;
            Ok(Preloaded { path, kernel, ram })
        };
        match load() {
            Ok(preloaded) => self.preloaded = Some(preloaded),
            Err(error) => tracing::debug!("kernel not loaded in advance: {error:#}"),
        }
    }
}

/// Descriptors that a specification names. Each can be taken once.
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// Those received with a message.
    pub fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    /// Those inherited from whoever started the program, by their numbers.
    ///
    /// # Errors
    /// /proc is not there.
    pub fn inherited() -> io::Result<Self> {
        let mut fds = Vec::new();
        for entry in fs::read_dir("/proc/self/fd")? {
            let name = entry?.file_name();
            let number = name.to_str().and_then(|name| name.parse::<usize>().ok());
            // 0 to 2 stay the program's own.
            let Some(number) = number.filter(|number| *number > 2) else {
                continue;
            };
            fds.resize_with(fds.len().max(number + 1), || None);
            fds[number] = Some(number as i32);
        }
        // The directory's own descriptor was among them and is closed by now.
        Ok(Self(
            fds.into_iter()
                .map(|fd| fd.and_then(sys::inherited_fd))
                .collect(),
        ))
    }

    /// # Errors
    /// There is none with that index, or it has been taken.
    pub fn take(&mut self, index: FdIndex, what: &str) -> Result<OwnedFd> {
        let slot = self.0.get_mut(index.0 as usize);
        slot.and_then(Option::take)
            .ok_or_else(|| anyhow!("{what}: no descriptor {} came with the request", index.0))
    }
}

/// A running VM.
pub struct Vm {
    /// Its vCPUs.
    pub vcpus: Vcpus,
    /// Its devices.
    pub bus: Arc<Bus>,
    /// The guest's kernel log.
    pub log: Arc<Log>,
    /// Written to when the guest has let go of a device.
    pub ejected: EventFd,
    /// How large it is, and how large it may become.
    pub size: Size,
    builder: Builder,
}

impl Vm {
    /// Ends all threads that touch guest memory, vCPUs first.
    pub fn stop(&mut self) {
        self.vcpus.stop();
        self.bus.pci.stop();
    }

    /// Plugs a network interface into the running guest.
    ///
    /// # Errors
    /// A descriptor that is no tap; no slot is free; the id is taken.
    pub fn add_net(&mut self, spec: &NetSpec, fds: &mut Descriptors) -> Result<()> {
        self.plug(Some(&spec.id), || {
            open_net(spec, fds).map(|net| Box::new(net) as _)
        })
    }

    /// Plugs a block device into the running guest.
    ///
    /// # Errors
    /// A file that is not usable; no slot is free; the id is taken.
    pub fn add_blk(&mut self, spec: &BlkSpec, fds: &mut Descriptors) -> Result<()> {
        self.plug(Some(&spec.id), || {
            open_blk(spec, fds).map(|blk| Box::new(blk) as _)
        })
    }

    fn plug(
        &mut self,
        id: Option<&str>,
        open: impl FnOnce() -> Result<Box<dyn VirtioDevice>>,
    ) -> Result<()> {
        let slot = self.bus.pci.free_hot_slot(id)?;
        let device = open()?;
        let function = self.builder.function(slot, device)?;
        self.bus.pci.insert(slot, id.map(str::to_owned), function);
        self.bus.platform.plugged(1 << slot);
        Ok(())
    }

    /// Lets the guest plug or unplug until it has `bytes` of memory beyond its RAM, or of huge pages if
    /// `huge`. The device for that is plugged with the first of it.
    ///
    /// # Errors
    /// More than the VM has addresses for; the host has no memory; the guest has no driver.
    pub fn plug_memory(&mut self, bytes: u64, huge: bool) -> Result<()> {
        let pool = self.size.pool(huge);
        let Some(device) = pool.plug(bytes, &self.builder.machine)? else {
            return Ok(());
        };
        let control = device.control();
        // Without an id: nobody may take it away.
        self.plug(None, || Ok(Box::new(device)))?;
        self.size.pool(huge).has_device(control);
        Ok(())
    }

    /// Makes vCPUs until there are `count`.
    ///
    /// # Errors
    /// More than the guest has been told of at boot; the host gives none.
    pub fn add_cpus(&mut self, count: u8) -> Result<()> {
        let max = self.size.cpus.max;
        if count > max {
            bail!("{count} CPUs are not possible: this VM was made for at most {max}");
        }
        // Below 64, as that is the most there may be.
        for id in self.vcpus.count() as u8..count {
            let vcpu = self.builder.machine.create_vcpu(id)?;
            vcpu::configure(&vcpu, &self.size.cpuid, max, None)?;
            let added = self.vcpus.add(vcpu, &self.builder.launcher);
            added.with_context(|| format!("cannot start the thread of CPU {id}"))?;
        }
        Ok(())
    }
}

/// What is needed to put a device on the bus, now and when one is hot-plugged.
struct Builder {
    machine: Arc<Machine>,
    memory: Arc<GuestMemoryMmap>,
    launcher: Arc<Launcher>,
}

/// Addresses above RAM, handed out upwards.
struct Window {
    next: u64,
    end: u64,
}

impl Window {
    fn above(layout: &Layout) -> Self {
        let next = layout.mmio64_start();
        Self {
            next,
            end: next + MMIO64_SIZE,
        }
    }

    fn take(&mut self, size: u64, align: u64) -> Result<u64> {
        let start = self.next.next_multiple_of(align);
        let end = start.checked_add(size).filter(|end| *end <= self.end);
        self.next = end.ok_or_else(|| anyhow!("no room for {size} bytes above guest memory"))?;
        Ok(start)
    }
}

impl Builder {
    fn function(&self, slot: u8, device: Box<dyn VirtioDevice>) -> Result<VirtioPci> {
        let (memory, wires) = (self.memory.clone(), self.machine.clone());
        Ok(VirtioPci::new(
            device,
            memory,
            wires,
            self.launcher.clone(),
            pci::first_bar(slot),
        )?)
    }

    fn add(&self, pci: &PciBus, id: Option<&str>, device: Box<dyn VirtioDevice>) -> Result<()> {
        let slot = pci.free_boot_slot()?;
        pci.insert(slot, id.map(str::to_owned), self.function(slot, device)?);
        Ok(())
    }
}

/// Makes ready what `spec` says. When it returns the vCPUs wait for [`Vcpus::resume`].
///
/// # Errors
/// One sentence for the operator: what of the specification or the host is not fit.
pub fn boot(
    prepared: Prepared,
    spec: &VmSpec,
    fds: &mut Descriptors,
    exit: &Arc<Exit>,
    stages: &mut Stages,
) -> Result<Vm> {
    check(spec, &prepared)?;
    let Prepared {
        machine,
        boot_cpu,
        cpuid,
        flavour,
        preloaded,
        ..
    } = prepared;
    let kernel = kernel_for(&spec.kernels, flavour)?;

    let hugepages = spec.memory.hugepages;
    let (file, preloaded) = match preloaded {
        Some(ready) if ready.path == kernel && !hugepages => (ready.ram, Some(ready.kernel)),
        _ => (RamFile::new(hugepages)?, None),
    };
    let bits = vcpu::address_bits(&cpuid);
    let reserve = Reserve::new(&spec.memory, bits)?;
    let huge = Reserve::huge(&spec.memory, reserve.as_ref(), bits)?;
    let reserves: Vec<_> = reserve.iter().chain(&huge).collect();
    let ram = Ram::map(file, &spec.memory, &reserves)?;
    let mut window = Window::above(&ram.layout);
    let image = spec
        .image
        .as_deref()
        .map(|path| map_image(path, &mut window));
    let image = image.transpose()?;
    stages.reached("memory");

    let files = Files::open(spec, preloaded, kernel)?;
    // Before the first thread starts: all of them inherit what is given up here.
    if let Some(jail) = &spec.jail {
        jail::enter(jail)?;
    }
    jail::confine()?;
    stages.reached("confined");
    worker::set_thread_filter(Box::new(|device| {
        jail::confine_thread(seccomp::Thread::Device(device))
    }));
    let launcher = Arc::new(Launcher::start().context("cannot start the devices' thread")?);
    let memory = ram.memory.clone();
    let mut builder = Builder {
        machine: machine.clone(),
        memory,
        launcher,
    };
    let Files {
        log,
        vsock,
        kernel: source,
        initrd,
    } = files;
    // Loading the kernel is mostly copying. KVM takes 5 ms for a memory slot, in which it waits for
    // readers of the old ones; the devices do not need them.
    let (loaded, devices, slots) = thread::scope(|scope| {
        let loader = scope.spawn(|| {
            let loaded = load(kernel, flavour, source, initrd, &ram);
            (loaded, clock::now())
        });
        let slots = scope.spawn(|| -> Result<u64> {
            for (gpa, region) in &ram.regions {
                machine.add_memory(*gpa, Backing::Ram(region.clone()))?;
            }
            Ok(clock::now())
        });
        let pmem = image
            .as_ref()
            .map(|(gpa, image)| Pmem::new(*gpa, image.size()));
        let devices = add_devices(&mut builder, spec, (pmem, vsock), fds, &log);
        stages.reached("devices");
        let panicked = |_| anyhow!("a thread that builds the VM panicked");
        let loaded = loader.join().map_err(panicked);
        (loaded, devices, slots.join().map_err(panicked))
    });
    let (pci, balloon) = devices?;
    stages.at("memory-slots", slots??);
    let (loaded, loaded_at) = loaded?;
    let (kernel, initrd) = loaded?;
    stages.at("kernel-loaded", loaded_at);

    if let Some((gpa, image)) = image {
        // Not waited for: the guest reads it when its device has been started, which is this thread's
        // next job at the earliest.
        let (machine, exit) = (machine.clone(), exit.clone());
        builder.launcher.post(move || {
            if let Err(e) = machine.add_memory(gpa, Backing::Image(image)) {
                let reason = format!("cannot show the guest its image: {e}");
                exit.end(ExitCause::Internal, reason);
            }
        })?;
    }

    let rsdp = acpi::write(&ram.memory, &ram.layout, spec.cpus.max)?;
    let command_line = cmdline::build(spec, flavour);
    let entry = boot::write_boot_data(
        &ram.memory,
        &ram.layout,
        &kernel,
        initrd,
        &command_line,
        rsdp,
    )?;

    let platform = Arc::new(Platform::new(exit.clone())?);
    machine.connect_pin(platform.interrupt(), EVENT_PIN)?;
    let ejected = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
    pci.notify_ejected(ejected.try_clone()?);
    let eject = pci.clone();
    platform.on_eject(Box::new(move |slots| eject.eject(slots)));
    let serial = spec.early_console.then(|| Serial::new(log.clone()));
    let bus = Arc::new(Bus {
        pci,
        platform,
        serial,
    });

    let mut cpus = vec![boot_cpu];
    for id in 1..spec.cpus.boot {
        cpus.push(machine.create_vcpu(id)?);
    }
    for cpu in &cpus {
        let entry = (cpu.id() == 0).then_some(&entry);
        vcpu::configure(cpu, &cpuid, spec.cpus.max, entry)?;
    }
    stages.reached("configured");
    let vcpus = Vcpus::start(cpus, &bus, exit).context("cannot start a vCPU thread")?;
    Ok(Vm {
        vcpus,
        bus,
        log,
        ejected,
        size: Size::new(spec, cpuid, (reserve, huge), balloon),
        builder,
    })
}

fn check(spec: &VmSpec, prepared: &Prepared) -> Result<()> {
    let cpus = &spec.cpus;
    if !(1..=64).contains(&cpus.boot) || !(cpus.boot..=64).contains(&cpus.max) {
        bail!(
            "{} CPUs of at most {} are not possible: 1 to 64 are",
            cpus.boot,
            cpus.max
        );
    }
    if usize::from(cpus.max) > prepared.max_cpus {
        bail!(
            "{} CPUs are not possible: KVM on this host gives {}",
            cpus.max,
            prepared.max_cpus
        );
    }
    Ok(())
}

/// The kernel that fits this KVM.
fn kernel_for(kernels: &KernelSpec, flavour: KvmFlavour) -> Result<&Path> {
    let (kernel, remedy) = match flavour {
        KvmFlavour::Hardware => (
            &kernels.hardware,
            "KVM of this host runs guests in hardware and no kernel for that is configured; \
             install vmlinux and set `kernel` in the configuration",
        ),
        KvmFlavour::Deprivileged => (
            &kernels.deprivileged,
            "KVM of this host runs guests deprivileged and no kernel for that is configured; \
             install vmlinux-deprivileged and set `kernel_deprivileged` in the configuration",
        ),
    };
    kernel.as_deref().ok_or_else(|| anyhow!(remedy))
}

/// What is opened by its path, while paths lead somewhere.
struct Files {
    log: Arc<Log>,
    vsock: Vsock,
    kernel: KernelSource,
    initrd: Option<Source>,
}

/// Where the kernel is.
enum KernelSource {
    /// In RAM.
    Loaded(Kernel),
    /// In its file.
    File(Source),
}

impl Files {
    fn open(spec: &VmSpec, preloaded: Option<Kernel>, kernel: &Path) -> Result<Self> {
        let listen = || format!("cannot listen at {}", spec.vsock.display());
        let mut vsock = Vsock::new(GUEST_CID, spec.vsock.clone()).with_context(listen)?;
        if let Some(jail) = &spec.jail {
            let outside = || anyhow!("the vsock socket is not in the jail's root directory");
            let inside = spec.vsock.strip_prefix(&jail.root).ok();
            vsock.dial_at(Path::new("/").join(inside.ok_or_else(outside)?));
        }
        Ok(Self {
            log: open_log(spec.console.as_deref())?,
            vsock,
            kernel: match preloaded {
                Some(kernel) => KernelSource::Loaded(kernel),
                None => KernelSource::File(Source::kernel(kernel)?),
            },
            initrd: spec.initrd.as_deref().map(Source::initrd).transpose()?,
        })
    }
}

fn load(
    path: &Path,
    flavour: KvmFlavour,
    kernel: KernelSource,
    initrd: Option<Source>,
    ram: &Ram,
) -> Result<(Kernel, Option<(u64, u64)>)> {
    let kernel = match kernel {
        KernelSource::Loaded(kernel) => kernel.check(path, &ram.layout)?,
        KernelSource::File(source) => {
            boot::load_kernel(source, ram.target(), &ram.layout, ram.can_share())?
        }
    };
    let kernel = kernel.check_flavour(path, flavour)?;
    if let Some(pages) = &kernel.shared {
        ram.share(pages)
            .with_context(|| format!("cannot map the guest kernel {}", path.display()))?;
    }
    let initrd = initrd
        .map(|source| boot::load_initrd(source, ram.target(), &ram.layout, &kernel))
        .transpose()?;
    Ok((kernel, initrd))
}

fn open_log(path: Option<&Path>) -> Result<Arc<Log>> {
    let open = |path: &Path| {
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
    };
    let failed = || {
        format!(
            "cannot write the console file {}",
            path.unwrap_or(Path::new("")).display()
        )
    };
    let file = path.map(open).transpose().with_context(failed)?;
    Log::new(file).with_context(failed)
}

/// The guest image and where the guest finds it.
fn map_image(path: &Path, window: &mut Window) -> Result<(u64, Arc<Image>)> {
    let file = boot::open_image(path)?;
    let image = Image::map(&file)
        .with_context(|| format!("cannot map the guest image {}", path.display()))?;
    Ok((window.take(image.size(), pmem::ALIGN)?, Arc::new(image)))
}

/// All devices of the specification, in the order in which the guest finds them.
fn add_devices(
    builder: &mut Builder,
    spec: &VmSpec,
    (pmem, vsock): (Option<Pmem>, Vsock),
    fds: &mut Descriptors,
    log: &Arc<Log>,
) -> Result<(Arc<PciBus>, Option<Arc<balloon::Control>>)> {
    let pci = Arc::new(PciBus::new(builder.machine.clone())?);
    builder.add(&pci, None, Box::new(Console::new(log.clone())))?;
    builder.add(&pci, None, Box::new(Rng::default()))?;
    if let Some(pmem) = pmem {
        builder.add(&pci, None, Box::new(pmem))?;
    }
    builder.add(&pci, None, Box::new(vsock))?;
    for fs in &spec.fs {
        let socket = fds.take(fs.socket, "virtio-fs")?.into();
        let device = Fs::new(&fs.tag, socket, FS_REQUEST_QUEUES)
            .with_context(|| format!("cannot use the file server of {:?}", fs.tag))?;
        builder.add(&pci, None, Box::new(device))?;
    }
    for net in &spec.net {
        builder.add(&pci, Some(&net.id), Box::new(open_net(net, fds)?))?;
    }
    for blk in &spec.blk {
        builder.add(&pci, Some(&blk.id), Box::new(open_blk(blk, fds)?))?;
    }
    let mut control = None;
    if spec.balloon {
        let balloon = Balloon::new()?;
        control = Some(balloon.control());
        builder.add(&pci, None, Box::new(balloon))?;
    }
    Ok((pci, control))
}

fn open_net(spec: &NetSpec, fds: &mut Descriptors) -> Result<Net> {
    let tap = fds.take(spec.tap, "network interface")?.into();
    let vhost = spec
        .vhost
        .map(|index| fds.take(index, "vhost-net"))
        .transpose()?;
    Net::new(spec.mac, spec.mtu, tap, vhost.map(File::from))
        .with_context(|| format!("cannot use the network interface {:?}", spec.id))
}

fn open_blk(spec: &BlkSpec, fds: &mut Descriptors) -> Result<Blk> {
    let file = fds.take(spec.file, "block device")?.into();
    Blk::new(file, &spec.serial, spec.read_only)
        .with_context(|| format!("cannot use the block device {:?}", spec.id))
}
