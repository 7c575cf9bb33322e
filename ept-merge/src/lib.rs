//! EPT.
