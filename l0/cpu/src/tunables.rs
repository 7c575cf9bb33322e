//! Sizes chosen by measurement, with their units and reasons.

/// Slots of the block table, of 64 bytes each. A kernel boot decodes about 70,000 blocks.
pub(crate) const BLOCK_SLOTS: usize = 64 * 1024;

/// Ops of the arena (32 bytes each: 32 MiB, in use as they come). A kernel boot decodes about 300,000, a nested one three
/// times as many.
pub(crate) const OP_CAPACITY: usize = 1024 * 1024;

/// Executions after which a block is translated.
pub(crate) const TRANSLATE_AFTER: u32 = 16;

/// Bytes of translated code per vCPU.
pub(crate) const CODE_CAPACITY: usize = 32 << 20;

/// Where in them the code begins that is seldom executed: it is half as much again as the rest.
pub(crate) const CODE_ASIDES: usize = 12 << 20;

/// Cold parts (56 bytes each: 14 MiB); about one instruction in six has one.
pub(crate) const COLD_CAPACITY: usize = 256 * 1024;

/// Blocks that a translation goes through, and their instructions: a whole loop body, most often. Longer ones are left
/// by their sides too often to be worth their size.
pub(crate) const TRACE_BLOCKS: usize = 12;
pub(crate) const TRACE_INSTRUCTIONS: usize = 128;

/// PAUSEs between two times that a vCPU offers its processor to other threads: some 20 µs of spinning, against half a
/// microsecond for an offer that nobody takes.
pub(crate) const SPINS_BEFORE_YIELD: u32 = 1024;
