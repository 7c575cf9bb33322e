//! x86 constants.
