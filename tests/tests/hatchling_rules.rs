//! The guest hypervisor breaks every rule of VM entry that L0 knows: whoever adds a rule adds a case there.

use std::fs;
use std::path::Path;

use vmcs_shadow::check::Rule;

#[test]
fn every_rule_of_vm_entry_has_a_case() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guests/programs/hatchling");
    let mut text = String::new();
    for entry in fs::read_dir(&folder).expect("the guest's sources are part of the repository") {
        let path = entry.expect("a readable folder").path();
        text += &fs::read_to_string(&path).expect("a readable source");
    }
    let words: Vec<_> = text.split(|c: char| !c.is_ascii_alphanumeric()).collect();
    let missing: Vec<_> = Rule::all().map(Rule::name).filter(|name| !words.contains(name)).collect();
    assert!(missing.is_empty(), "no case for {missing:?}");
}
