//! The system calls that no crate wraps. The only `unsafe` code of this program.

use std::os::fd::{AsFd, AsRawFd};

use nix::pty::Winsize;

mod ioctls {
    nix::ioctl_read_bad!(window_size, libc::TIOCGWINSZ, nix::pty::Winsize);
}

/// Rows and columns of a terminal; none where there is no terminal.
pub fn window_size(terminal: &impl AsFd) -> Option<(u32, u32)> {
    let mut size = Winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the descriptor is open while borrowed, and `size` is what TIOCGWINSZ fills.
    unsafe { ioctls::window_size(terminal.as_fd().as_raw_fd(), &mut size) }.ok()?;
    Some((size.ws_row.into(), size.ws_col.into()))
}
