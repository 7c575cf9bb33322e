//! Sizes, with their units and reasons.

/// Sets of EPT02's cache (64 bytes each, four pages): 1 MiB for every vCPU holds 65536 pages, 256 MiB of an L2 that is
/// mapped in 4-KiB pages and everything of one in 2-MiB pages.
pub const SETS: usize = 16 * 1024;

/// Roots alive at once. An EPTP list has 512 of them.
pub const ROOTS: usize = 1024;

/// Attempts to set accessed and dirty flags while other processors change the entries. Each failure is somebody else's
/// progress; a guest that does it on purpose gets a violation that it can retry.
pub const MARK_ATTEMPTS: u32 = 64;
