//! Many cases, one report: runs them on the software CPU and natively, and groups what differs by the form of the
//! instruction.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io;

use iced_x86::{Code, Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter};

use crate::case::{Bits, Case, Final, Outcome, image_index};
use crate::compare::{differences, exception, flags, hex};
use crate::generate::{self, Kind, Name};
use crate::native::{self, Native};
use crate::soft::Soft;

/// What differs for one form.
#[derive(Debug)]
pub struct Failure {
    pub count: u64,
    pub first: Name,
    /// Disassembly, initial state and differences of the first.
    pub report: String,
}

/// The sum of a campaign.
#[derive(Debug, Default)]
pub struct Summary {
    pub compared: u64,
    /// Instructions of the sequences and programs among them.
    pub instructions: u64,
    /// Cases left out, by reason.
    pub skipped: BTreeMap<String, u64>,
    pub failures: BTreeMap<(String, Kind), Failure>,
}

impl Summary {
    /// Table and first reports, for people; empty if nothing differed.
    pub fn report(&self, reports: usize) -> String {
        let mut text = String::new();
        let mut sorted: Vec<_> = self.failures.iter().collect();
        sorted.sort_by_key(|(key, failure)| (key.1, std::cmp::Reverse(failure.count)));
        for (_, failure) in sorted.iter().take(reports) {
            let _ = writeln!(text, "{}\n", failure.report);
        }
        for ((code, kind), failure) in &sorted {
            let _ = writeln!(text, "{code} ({kind:?}): {} differ, first {}", failure.count, failure.first);
        }
        text
    }

    /// One line of figures.
    pub fn figures(&self) -> String {
        let skipped: u64 = self.skipped.values().sum();
        let failed: u64 = self.failures.values().map(|f| f.count).sum();
        let length = self.instructions;
        format!(
            "{} cases compared ({length} instructions), {skipped} skipped, {failed} differ",
            self.compared
        )
    }
}

/// The executors.
pub struct Campaign {
    native: Native,
    /// Translates.
    soft: Soft,
    interpreter: Soft,
    pub summary: Summary,
}

impl Campaign {
    /// Starts both; an error says why the host cannot be the oracle.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            native: Native::new()?,
            soft: Soft::new(),
            interpreter: Soft::interpreter(),
            summary: Summary::default(),
        })
    }

    /// Runs all cases with these names.
    pub fn run(&mut self, names: impl IntoIterator<Item = Name>) {
        let mut batch = Vec::with_capacity(native::BATCH);
        for name in names {
            let Some(case) = generate::case(name) else {
                self.skip("no encoding found");
                continue;
            };
            // The software CPU goes first: it sees every instruction, and code it will not answer for is not
            // executed natively.
            match self.software(name, &case) {
                Outcome::Skipped(why) => self.skip(&why),
                Outcome::Done(done) if self.native.occupies(done.exception.address) => {
                    self.skip("touches memory of the native process");
                }
                soft => batch.push((name, case, soft)),
            }
            if batch.len() == native::BATCH {
                self.compare(&mut batch);
            }
        }
        self.compare(&mut batch);
    }

    /// What the software CPU makes of the case. Sequences and programs are executed three times: step by step, by the
    /// interpreter in one go, translated in one go; all three must agree to the instruction and the bit.
    fn software(&mut self, name: Name, case: &Case) -> Outcome {
        if !matches!(name.kind, Kind::Sequence | Kind::Program) {
            return self.soft.execute(case, name.number & 1 == 0 || name.kind == Kind::Mutated);
        }
        let steps = self.interpreter.execute(case, true);
        let Outcome::Done(stepped) = &steps else { return steps };
        let instructions = self.interpreter.instructions();
        self.summary.instructions += instructions;
        let whole = self.interpreter.execute(case, false);
        let lines = disagreement(case, "steps", stepped, &whole);
        let mut lines = self.counted(lines, "steps | whole", instructions, self.interpreter.instructions());
        let stalls = self.interpreter.stalls();
        let translated = self.soft.execute(case, false);
        lines.extend(disagreement(case, "interpreted", stepped, &translated));
        lines = self.counted(lines, "interpreted | translated", instructions, self.soft.instructions());
        lines = self.counted(lines, "interpreted | translated, stalls", stalls, self.soft.stalls());
        if !lines.is_empty() {
            let insn = first_instruction(case);
            self.fail(name, case, &insn, &lines);
        }
        steps
    }

    fn counted(&self, mut lines: Vec<String>, who: &str, one: u64, other: u64) -> Vec<String> {
        if one != other {
            lines.push(format!("instructions ({who})  {one}  |  {other}"));
        }
        lines
    }

    fn skip(&mut self, why: &str) {
        *self.summary.skipped.entry(why.to_owned()).or_default() += 1;
    }

    fn compare(&mut self, batch: &mut Vec<(Name, Case, Outcome)>) {
        let cases: Vec<&Case> = batch.iter().map(|(_, case, _)| case).collect();
        let outcomes = self.native.execute(&cases);
        for ((name, case, soft), native) in batch.drain(..).zip(outcomes) {
            let insn = first_instruction(&case);
            let lines = match (&native, &soft) {
                (Outcome::Skipped(why), _) => {
                    self.skip(why);
                    continue;
                }
                (Outcome::Done(native), Outcome::Done(soft)) => {
                    let last = last_instruction(name.kind, &case, soft).unwrap_or(insn);
                    differences(&case, &last, native, soft)
                }
                (native, soft) => [("native", native), ("soft", soft)]
                    .iter()
                    .filter_map(|(who, outcome)| match outcome {
                        Outcome::Broken(why) => Some(format!("{who}: {why}")),
                        Outcome::Done(done) => Some(format!("{who}: {}", exception(done))),
                        Outcome::Skipped(_) => None,
                    })
                    .collect(),
            };
            self.summary.compared += 1;
            if !lines.is_empty() {
                self.fail(name, &case, &insn, &lines);
            }
        }
    }

    fn fail(&mut self, name: Name, case: &Case, insn: &Instruction, lines: &[String]) {
        let key = (format!("{:?}/{}", insn.code(), case.bits.count()), name.kind);
        let entry = self.summary.failures.entry(key).or_insert_with(|| Failure {
            count: 0,
            first: name,
            report: format!(
                "{}\n  differs (native | software):\n    {}",
                describe(name, case),
                lines.join("\n    ")
            ),
        });
        entry.count += 1;
    }
}

/// How two executions by software differ: nothing is left open there.
fn disagreement(case: &Case, who: &str, one: &Final, other: &Outcome) -> Vec<String> {
    let nothing = Instruction::default();
    match other {
        Outcome::Done(other) => differences(case, &nothing, one, other)
            .into_iter()
            .map(|line| format!("({who} | other) {line}"))
            .collect(),
        Outcome::Skipped(why) | Outcome::Broken(why) => vec![format!("other than {who}: {why}")],
    }
}

fn code_of(case: &Case) -> &[u8] {
    image_index(case.start.rip).map_or(&[], |at| &case.image[at..(at + case.code_len).min(case.image.len())])
}

/// The first instruction, which may go on into the bytes behind the case's own.
fn first_instruction(case: &Case) -> Instruction {
    let code = image_index(case.start.rip).map_or(&[][..], |at| &case.image[at..]);
    generate::decode(case.bits, code, case.start.rip)
}

/// The instruction that a sequence faulted at: it is what the comparison must make allowances for.
fn last_instruction(kind: Kind, case: &Case, soft: &Final) -> Option<Instruction> {
    let at = image_index(soft.registers.rip)?;
    if kind == Kind::Program {
        return Some(generate::decode(case.bits, &soft.image[at..], soft.registers.rip));
    }
    let code = code_of(case);
    let start = at.checked_sub(image_index(case.start.rip)?)?;
    (kind == Kind::Sequence && start < code.len())
        .then(|| generate::decode(case.bits, &code[start..], soft.registers.rip))
}

/// A case's name, code and initial state.
pub fn describe(name: Name, case: &Case) -> String {
    let mut text = format!("case {name}\n");
    let code = code_of(case);
    let mut formatter = IntelFormatter::new();
    let mut decoder = Decoder::with_ip(case.bits.count(), code, case.start.rip, DecoderOptions::NONE);
    while decoder.can_decode() {
        let position = decoder.position();
        let insn = decoder.decode();
        let mut line = String::new();
        formatter.format(&insn, &mut line);
        let bytes: String = code[position..decoder.position()].iter().map(|b| format!("{b:02x}")).collect();
        let form = if insn.code() == Code::INVALID { String::new() } else { format!("{:?}", insn.code()) };
        let _ = writeln!(text, "  {:#x}  {bytes:32} {line}   {form}", insn.ip());
    }
    let start = &case.start;
    for (i, row) in start.gpr.chunks(4).enumerate() {
        if i < 2 || case.bits == Bits::B64 {
            let names = [
                ["rax", "rcx", "rdx", "rbx"],
                ["rsp", "rbp", "rsi", "rdi"],
                ["r8", "r9", "r10", "r11"],
                ["r12", "r13", "r14", "r15"],
            ][i];
            let cells: Vec<String> = names.iter().zip(row).map(|(n, v)| format!("{n}={v:#x}")).collect();
            let _ = writeln!(text, "  {}", cells.join(" "));
        }
    }
    let _ = writeln!(
        text,
        "  rflags={} fs={:#x} gs={:#x} fcw={:#x} fsw={:#x} ftw={:#x} mxcsr={:#x}",
        flags(start.rflags),
        start.fs_base,
        start.gs_base,
        start.fpu.fcw,
        start.fpu.fsw,
        start.fpu.ftw,
        start.fpu.mxcsr
    );
    let mut factory = iced_x86::InstructionInfoFactory::new();
    for used in factory.info(&first_instruction(case)).used_registers() {
        let register = used.register();
        if register.is_vector_register() {
            let i = register.number() & 15;
            let _ = writeln!(text, "  ymm{i}={}", hex(&start.fpu.ymm[i]));
        } else if register.is_st() || register.is_mm() {
            let i = register.number() & 7;
            let _ = writeln!(text, "  st{i}={}", hex(&start.fpu.st[i]));
        }
    }
    text
}
