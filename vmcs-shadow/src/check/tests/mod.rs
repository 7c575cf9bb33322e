//! For every rule, one illegal mutation of a good VMCS12 fails with exactly that rule, and a legal neighbour passes.

mod controls;
mod good;
mod segments;
mod state;

use std::collections::HashSet;

use super::*;
use good::Entry;

/// A rule's case: what is done to a good VMCS12, and what to its legal neighbour.
struct Case {
    rule: Rule,
    base: fn() -> Entry,
    illegal: Box<dyn Fn(&mut Entry)>,
    legal: Box<dyn Fn(&mut Entry)>,
}

/// A case on a 64-bit guest with most controls in use.
fn case(rule: Rule, illegal: impl Fn(&mut Entry) + 'static, legal: impl Fn(&mut Entry) + 'static) -> Case {
    Case { rule, base: good::long_mode, illegal: Box::new(illegal), legal: Box::new(legal) }
}

impl Case {
    fn on(self, base: fn() -> Entry) -> Self {
        Self { base, ..self }
    }
}

fn all_cases() -> Vec<Case> {
    let mut cases = controls::cases();
    cases.extend(state::cases());
    cases.extend(segments::cases());
    cases
}

/// Which of the three checks fails: its kind of failure is another for each.
fn stage_of(rule: Rule) -> usize {
    match rule.section() {
        "VM-Execution Control Fields" | "VM-Exit Control Fields" | "VM-Entry Control Fields" => 0,
        "Checks on Host Control Registers, MSRs, and SSP"
        | "Checks on Host Segment and Descriptor-Table Registers"
        | "Checks Related to Address-Space Size" => 1,
        _ => 2,
    }
}

#[test]
fn good_guests_pass() {
    for (name, base) in good::ALL {
        assert_eq!(base().check(), Ok(()), "{name}");
    }
}

#[test]
fn each_rule_has_its_illegal_case_and_a_legal_neighbour() {
    for case in all_cases() {
        let rule = case.rule;
        let mut entry = (case.base)();
        (case.illegal)(&mut entry);
        assert_eq!(entry.check(), Err((stage_of(rule), rule)), "illegal case of {rule}");
        let mut entry = (case.base)();
        (case.legal)(&mut entry);
        assert_eq!(entry.check(), Ok(()), "legal neighbour of {rule}");
    }
}

#[test]
fn no_rule_lacks_a_case() {
    let tested: HashSet<Rule> = all_cases().iter().map(|case| case.rule).collect();
    let missing: Vec<String> =
        Rule::all().filter(|rule| !tested.contains(rule)).map(|r| r.to_string()).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn rules_speak() {
    let mut names = HashSet::new();
    for rule in Rule::all() {
        assert!(names.insert(rule.to_string()), "{rule} twice");
        assert!(!rule.fields().is_empty() && !rule.section().is_empty(), "{rule}");
        let text = rule.describe();
        assert!(!text.contains("  ") && !text.ends_with('.'), "{rule}: {text}");
    }
    assert_eq!(Rule::GuestPdpte.entry_failure_qualification(), 2);
    assert_eq!(Rule::LinkPointerShadow.entry_failure_qualification(), 4);
    assert_eq!(Rule::GuestCr0.entry_failure_qualification(), 0);
}

#[test]
fn a_vmcs_of_any_contents_is_refused_quietly() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..20_000 {
        let mut entry = good::long_mode();
        for _ in 0..1 + seed % 8 {
            seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            let info = &crate::field::FIELDS[(seed >> 33) as usize % crate::field::COUNT];
            let value = match seed >> 60 & 3 {
                0 => u64::MAX,
                1 => seed.rotate_left(17),
                2 => 1 << (seed >> 20 & 63),
                _ => entry.vmcs.get(info.field) ^ 1 << (seed >> 20 & 63),
            };
            entry.vmcs.set(info.field, info.field.width().truncate(value));
        }
        let _ = entry.check();
    }
}
