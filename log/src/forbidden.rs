//! What a process says of a system call that its filter forbids, before it ends.

use std::io;
use std::sync::OnceLock;

use crate::calls;

/// Longest sentence, in bytes.
const MOST: usize = 160;

/// A program, and the status that it ends with.
static PROGRAM: OnceLock<(&str, i32)> = OnceLock::new();

/// Has a forbidden call (SIGSYS, of SECCOMP_RET_TRAP) told by its name on standard error, and end the process
/// with this status. The first call in a process counts.
///
/// # Errors
/// sigaction(2).
pub fn install(program: &'static str, status: i32) -> io::Result<()> {
    let _ = PROGRAM.set((program, status));
    // SAFETY: an all-zero sigaction is valid; the handler is async-signal-safe (see there).
    let done = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_forbidden as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut())
    };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

extern "C" fn on_forbidden(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo; for SIGSYS, si_syscall lies 8
    // bytes into its union, which begins 16 bytes into the structure (sigaction(2)).
    let call = unsafe { info.cast::<i32>().add(6).read() };
    // SAFETY: with SA_SIGINFO the kernel passes the interrupted thread's ucontext.
    let registers = unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let second = registers[libc::REG_RSI as usize] as u32;
    let (program, status) = PROGRAM.get().copied().unwrap_or(("?", 1));
    let text = sentence(program, call.unsigned_abs(), second);
    // SAFETY: write(2) and _exit(2) are async-signal-safe; the buffer is on this stack.
    unsafe {
        libc::write(libc::STDERR_FILENO, text.bytes.as_ptr().cast(), text.length);
        libc::_exit(status);
    }
}

/// Text in a buffer of its own: a signal handler allocates nothing.
struct Text {
    bytes: [u8; MOST],
    length: usize,
}

impl Text {
    fn push(&mut self, part: &str) {
        for byte in part.bytes() {
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = byte;
                self.length += 1;
            }
        }
    }

    fn push_number(&mut self, number: u32, base: u32) {
        let mut digits = [0_u8; 10];
        let (mut rest, mut first) = (number, digits.len());
        for place in digits.iter_mut().rev() {
            *place = b"0123456789abcdef"[(rest % base) as usize];
            rest /= base;
            first -= 1;
            if rest == 0 {
                break;
            }
        }
        self.push(str::from_utf8(&digits[first..]).unwrap_or_default());
    }
}

fn sentence(program: &str, call: u32, second: u32) -> Text {
    let mut text = Text {
        bytes: [0; MOST],
        length: 0,
    };
    text.push(program);
    text.push(": system call ");
    match calls::name(call as usize) {
        Some(name) => text.push(name),
        None => text.push_number(call, 10),
    }
    text.push(" with 0x");
    text.push_number(second, 16);
    text.push(" second is not allowed in this thread\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_told_by_its_name_and_what_it_is_about() {
        let said = |call, second| {
            let text = sentence("sepal-vmm", call, second);
            String::from_utf8(text.bytes[..text.length].to_vec()).unwrap()
        };
        assert_eq!(
            said(16, 0xae01),
            "sepal-vmm: system call ioctl with 0xae01 second is not allowed in this thread\n"
        );
        assert_eq!(
            said(4_000_000_000, u32::MAX),
            "sepal-vmm: system call 4000000000 with 0xffffffff second is not allowed in this thread\n"
        );
        assert!(said(0, 0).contains(" read with 0x0 second"));
    }
}
