//! placeholder
#[derive(Default)]
pub struct BlockCache;
