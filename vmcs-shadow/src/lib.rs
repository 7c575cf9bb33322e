//! VMCS fields.
