//! Workers without threads, for tests and fuzz targets that act as the guest step by step.
//!
//! Only with the feature `testing`, which no program has. While [`run`] lasts, a device that the
//! calling thread activates is served by this thread, from within [`VirtioDevice::activate`], and
//! every two turns of its handler are parted by a step of the caller's: what the guest does and what
//! the device does alternate, always in the same order.
//!
//! [`VirtioDevice::activate`]: super::device::VirtioDevice::activate

use std::cell::RefCell;

type Step = Box<dyn FnMut() -> bool>;

thread_local! {
    static STEP: RefCell<Option<Step>> = const { RefCell::new(None) };
}

/// Calls `activate`. After each turn of the device's worker `step` is called; when it answers false the
/// worker ends, as if it had been told to stop.
pub fn run<T>(step: impl FnMut() -> bool + 'static, activate: impl FnOnce() -> T) -> T {
    STEP.set(Some(Box::new(step)));
    let result = activate();
    STEP.take();
    result
}

/// Whether this thread is to serve the devices that it activates.
pub(super) fn is_wanted() -> bool {
    STEP.with_borrow(Option::is_some)
}

/// Takes the step between two turns: whether there is another turn. `None` on a thread of a worker.
pub(super) fn step() -> Option<bool> {
    // Taken out meanwhile: a step may look at anything of this thread.
    let mut step = STEP.take()?;
    let more = step();
    STEP.set(Some(step));
    Some(more)
}
