//! What a case expects of a VM exit, and the comparison.

use core::fmt;
use rt::report::{fail, pass, skip};
use rt::vmx::exit::event;
use rt::vmx::{Control, Exit, Failure, Vm, reason};

/// A VM exit as it should be. Fields that the SDM leaves undefined for the exit stay `None`.
#[derive(Clone, Copy)]
pub struct Want {
    reason: u32,
    qualification: Option<u64>,
    length: Option<u32>,
    /// Value and the bits that are defined.
    information: Option<(u32, u32)>,
    at: Option<u64>,
    interruption: u32,
    error_code: Option<u32>,
    vectoring: u32,
    vectoring_error: Option<u32>,
    physical: Option<u64>,
    linear: Option<u64>,
}

impl Want {
    /// An exit with qualification 0, at the start of the code, with no event in it.
    pub const fn exit(reason: u32) -> Want {
        Want {
            reason,
            qualification: Some(0),
            length: None,
            information: None,
            at: Some(0),
            interruption: 0,
            error_code: None,
            vectoring: 0,
            vectoring_error: None,
            physical: None,
            linear: None,
        }
    }

    /// An exit of an instruction of this length at the start of the code.
    pub const fn instruction(reason: u32, length: u32) -> Want {
        Want { length: Some(length), ..Want::exit(reason) }
    }

    pub const fn qualification(self, qualification: u64) -> Want {
        Want { qualification: Some(qualification), ..self }
    }

    pub const fn any_qualification(self) -> Want {
        Want { qualification: None, ..self }
    }

    pub const fn length(self, length: u32) -> Want {
        Want { length: Some(length), ..self }
    }

    /// Instruction information, of which the bits in `defined` mean something.
    pub const fn information(self, information: u32, defined: u32) -> Want {
        Want { information: Some((information, defined)), ..self }
    }

    /// Offset of RIP into the code.
    pub const fn at(self, at: u64) -> Want {
        Want { at: Some(at), ..self }
    }

    pub const fn anywhere(self) -> Want {
        Want { at: None, ..self }
    }

    /// Exit interruption information (the valid bit is added).
    pub const fn event(self, interruption: u32) -> Want {
        Want { interruption: interruption | event::VALID, ..self }
    }

    /// Exit interruption information with an error code.
    pub const fn event_with_error(self, interruption: u32, error: u32) -> Want {
        Want { error_code: Some(error), ..self.event(interruption | event::ERROR_CODE) }
    }

    /// IDT-vectoring information (the valid bit is added).
    pub const fn vectoring(self, vectoring: u32) -> Want {
        Want { vectoring: vectoring | event::VALID, ..self }
    }

    /// IDT-vectoring information with an error code.
    pub const fn vectoring_with_error(self, vectoring: u32, error: u32) -> Want {
        Want { vectoring_error: Some(error), ..self.vectoring(vectoring | event::ERROR_CODE) }
    }

    pub const fn physical(self, physical: u64) -> Want {
        Want { physical: Some(physical), ..self }
    }

    pub const fn linear(self, linear: u64) -> Want {
        Want { linear: Some(linear), ..self }
    }

    /// Reports the case.
    pub fn check(&self, name: &str, exit: &Exit) {
        match self.difference(exit) {
            None => pass(name),
            Some(what) => fail(name, format_args!("{what} is wrong: {exit}, wanted {self}")),
        }
    }

    fn difference(&self, exit: &Exit) -> Option<&'static str> {
        fn differs<T: PartialEq>(wanted: Option<T>, found: T) -> bool {
            wanted.is_some_and(|wanted| wanted != found)
        }
        // Bits other than the valid bit mean nothing without it. Bit 12 of the vectoring field is undefined.
        let event_of = |field: u32| if field & event::VALID != 0 { field } else { 0 };
        let vectoring = event_of(exit.vectoring) & !event::NMI_UNBLOCKING;
        let table = [
            (exit.reason != self.reason, "the reason"),
            (differs(self.qualification, exit.qualification), "the qualification"),
            (event_of(exit.interruption) != self.interruption, "the interruption information"),
            (differs(self.error_code, exit.error_code), "the error code"),
            (vectoring != self.vectoring, "the IDT-vectoring information"),
            (differs(self.vectoring_error, exit.vectoring_error), "the IDT-vectoring error code"),
            (differs(self.length, exit.length), "the instruction length"),
            (
                self.information.is_some_and(|(value, defined)| (value ^ exit.information) & defined != 0),
                "the instruction information",
            ),
            (differs(self.physical, exit.physical), "the guest-physical address"),
            (differs(self.linear, exit.linear), "the guest-linear address"),
            (differs(self.at, exit.at), "RIP"),
        ];
        table.iter().find(|(wrong, _)| *wrong).map(|(_, what)| *what)
    }

    /// Runs L2 and reports the case.
    pub fn run(&self, name: &str, vm: &mut Vm) -> Exit {
        let exit = vm.run();
        self.check(name, &exit);
        exit
    }
}

impl fmt::Display for Want {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "exit {}", self.reason)?;
        for (name, value) in [
            ("qualification", self.qualification),
            ("length", self.length.map(u64::from)),
            ("information", self.information.map(|(value, _)| value.into())),
            ("guest-physical", self.physical),
            ("linear", self.linear),
            ("interruption", (self.interruption != 0).then_some(self.interruption.into())),
            ("error", self.error_code.map(u64::from)),
            ("vectoring", (self.vectoring != 0).then_some(self.vectoring.into())),
            ("vectoring error", self.vectoring_error.map(u64::from)),
            ("at +", self.at),
        ] {
            if let Some(value) = value {
                write!(f, " {name} {value:#x}")?;
            }
        }
        Ok(())
    }
}

/// With these controls, the code exits as wanted. `None` if a control is missing (which is reported).
pub fn exits(name: &str, controls: &[Control], code: u64, want: Want) -> Option<(Vm, Exit)> {
    let mut vm = Vm::fresh(code);
    if !vm.set_or_skip(name, controls) {
        return None;
    }
    let exit = want.run(name, &mut vm);
    Some((vm, exit))
}

/// With these controls set and those clear, the code runs to its VMCALL.
pub fn runs(name: &str, set: &[Control], clear: &[Control], code: u64) -> Option<(Vm, Exit)> {
    let mut vm = Vm::fresh(code);
    if !vm.set_or_skip(name, set) {
        return None;
    }
    if let Some(control) = clear.iter().find(|control| !control.clearable()) {
        skip(name, control.name);
        return None;
    }
    vm.unset(clear);
    let exit = to_end(name, &mut vm);
    Some((vm, exit))
}

/// L2 runs to its VMCALL.
pub fn to_end(name: &str, vm: &mut Vm) -> Exit {
    Want::instruction(reason::VMCALL, 3).anywhere().run(name, vm)
}

/// Reports a VMX instruction that should succeed.
pub fn succeeded(name: &str, outcome: Result<(), Failure>) {
    match outcome {
        Ok(()) => pass(name),
        Err(failure) => fail(name, format_args!("{failure}")),
    }
}

/// Reports a VMX instruction that should fail in this way.
pub fn failed(name: &str, outcome: Result<(), Failure>, wanted: Failure) {
    match outcome {
        Err(failure) if failure == wanted => pass(name),
        Err(failure) => fail(name, format_args!("{failure}, wanted {wanted}")),
        Ok(()) => fail(name, format_args!("success, wanted {wanted}")),
    }
}
