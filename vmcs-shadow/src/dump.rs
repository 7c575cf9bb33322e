//! A VMCS for people to read.

use std::fmt::Write;

use crate::encoding::{Area, Width};
use crate::field::{FIELDS, Field, Vmcs};

/// Every field by area, one to a line: encoding, value in its width, name. Fields that are 0 are left out.
pub fn dump(vmcs: &Vmcs) -> String {
    let mut text = String::new();
    for (area, title) in [
        (Area::Control, "controls"),
        (Area::GuestState, "guest state"),
        (Area::HostState, "host state"),
        (Area::ExitInformation, "exit information"),
    ] {
        let _ = writeln!(text, "{title}:");
        let fields = FIELDS.iter().map(|info| info.field).filter(|field| field.area() == area);
        for field in fields.filter(|&field| vmcs.get(field) != 0) {
            let _ = writeln!(text, "  {}", line(vmcs, field));
        }
    }
    text
}

/// One field: encoding, value, name.
pub fn line(vmcs: &Vmcs, field: Field) -> String {
    let info = field.info();
    format!("{:04x} {:>16} {}", info.raw, value(vmcs, field), info.name)
}

/// A field's value in as many hexadecimal digits as its width has.
pub fn value(vmcs: &Vmcs, field: Field) -> String {
    let digits = match field.width() {
        Width::W16 => 4,
        Width::W32 => 8,
        Width::W64 | Width::Natural => 16,
    };
    format!("{:0digits$x}", vmcs.get(field))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_under_their_area() {
        let mut vmcs = Vmcs::default();
        vmcs.set(Field::Vpid, 0x12);
        vmcs.set(Field::GuestRip, 0xffff_ffff_8100_0000);
        vmcs.set(Field::ExitReason, 10);
        let expected = "\
controls:
  0000             0012 VPID
guest state:
  681e ffffffff81000000 guest RIP
host state:
exit information:
  4402         0000000a exit reason
";
        assert_eq!(dump(&vmcs), expected);
    }
}
