//! How memory comes from the system.

#![cfg_attr(
    all(target_os = "linux", target_env = "gnu"),
    expect(unsafe_code, reason = "a setting of the C library")
)]

/// Keeps freed memory for later, where the C library is glibc; does nothing elsewhere.
///
/// A training step makes and drops hundreds of mebibytes. By default each large piece comes as
/// fresh pages and goes back, which costs a fault every 4 KiB and an interrupt of the other cores.
/// One arena, because the others cannot hold pieces above 64 MiB.
pub(crate) fn keep() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (parameter, value) in
        [(libc::M_MMAP_MAX, 0), (libc::M_TRIM_THRESHOLD, i32::MAX), (libc::M_ARENA_MAX, 1)]
    {
        // SAFETY: called before any other thread exists; a value it refuses changes nothing.
        let _ = unsafe { libc::mallopt(parameter, value) };
    }
}
