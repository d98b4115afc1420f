//! Which devices a container may use: its rules as a BPF program on its cgroup.
//!
//! cgroup v2 has no files for this; the kernel asks a program of type BPF_PROG_TYPE_CGROUP_DEVICE
//! instead. libcgroups could load one as well, but only through libbpf, which is a C library with
//! two more behind it and larger than the rest of what the agent needs it for.

use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::error::{Context, Result};
use crate::sys;

/// One instruction as the kernel takes it (include/uapi/linux/bpf.h, `struct bpf_insn`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    code: u8,
    /// Destination register in the low half, source in the high.
    registers: u8,
    offset: i16,
    immediate: i32,
}

// Instruction set of the kernel (Documentation/bpf/standardization/instruction-set.rst).
const LOAD_WORD: u8 = 0x61;
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const MOVE: u8 = 0xb4;
const MOVE_REGISTER: u8 = 0xbc;
const JUMP_IF_EQUAL: u8 = 0x16;
const JUMP_IF_NOT_EQUAL: u8 = 0x56;
const EXIT: u8 = 0x95;

// Registers of the program. R0 is the answer, R1 comes in as the context.
const ANSWER: u8 = 0;
const SCRATCH: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

// BPF_DEVCG_* of include/uapi/linux/bpf.h.
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const EVERYTHING: i32 = MKNOD | READ | WRITE;
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;

/// One rule; `None` stands for any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

impl Rule {
    const fn allow(kind: i32, major: Option<i32>, minor: Option<i32>, access: i32) -> Self {
        Self {
            allow: true,
            kind: Some(kind),
            major,
            minor,
            access,
        }
    }

    fn of_spec(rule: &LinuxDeviceCgroup) -> Self {
        let number = |number: Option<i64>| {
            number
                .and_then(|n| u32::try_from(n).ok())
                .map(u32::cast_signed)
        };
        let access = rule
            .access()
            .as_deref()
            .unwrap_or("rwm")
            .chars()
            .map(|letter| match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MKNOD,
                _ => 0,
            });
        Self {
            allow: rule.allow(),
            kind: match rule.typ() {
                Some(LinuxDeviceType::B) => Some(BLOCK),
                Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHARACTER),
                _ => None,
            },
            major: number(rule.major()),
            minor: number(rule.minor()),
            access: access.fold(0, |all, one| all | one),
        }
    }

    fn is_for_all(&self) -> bool {
        self.kind.is_none()
            && self.major.is_none()
            && self.minor.is_none()
            && self.access == EVERYTHING
    }
}

/// What every container may use whatever its rules say, as runc has it: to make nodes (which does
/// not open them), and the devices of OCI runtime-spec 1.2, config-linux, "Default Devices".
const ALWAYS: [Rule; 11] = [
    Rule::allow(CHARACTER, None, None, MKNOD),
    Rule::allow(BLOCK, None, None, MKNOD),
    Rule::allow(CHARACTER, Some(1), Some(3), EVERYTHING),
    Rule::allow(CHARACTER, Some(1), Some(5), EVERYTHING),
    Rule::allow(CHARACTER, Some(1), Some(7), EVERYTHING),
    Rule::allow(CHARACTER, Some(1), Some(8), EVERYTHING),
    Rule::allow(CHARACTER, Some(1), Some(9), EVERYTHING),
    Rule::allow(CHARACTER, Some(5), Some(0), EVERYTHING),
    Rule::allow(CHARACTER, Some(5), Some(1), EVERYTHING),
    Rule::allow(CHARACTER, Some(5), Some(2), EVERYTHING),
    Rule::allow(CHARACTER, Some(136), None, EVERYTHING),
];

/// Restricts a cgroup to the devices that `rules` allow; later ones go before earlier ones, and
/// where none speaks the answer is no.
///
/// # Errors
/// When the kernel has no such programs or refuses this one.
pub fn restrict(cgroup: &Path, rules: &[LinuxDeviceCgroup]) -> Result<()> {
    let Some(program) = program(rules) else {
        return Ok(());
    };
    sys::attach_device_program(cgroup, &program)
        .context(|| "cannot restrict the container's devices".into())
}

/// The program for some rules; `None` when they allow everything.
fn program(rules: &[LinuxDeviceCgroup]) -> Option<Vec<Instruction>> {
    let rules: Vec<Rule> = rules.iter().map(Rule::of_spec).collect();
    // Nothing before a rule for everything matters.
    let start = rules.iter().rposition(Rule::is_for_all).unwrap_or(0);
    let rules = &rules[start..];
    if !rules.is_empty() && rules[0].is_for_all() && rules.iter().all(|rule| rule.allow) {
        return None;
    }
    let op = |code, to, from: u8, offset, immediate| Instruction {
        code,
        registers: to | from << 4,
        offset,
        immediate,
    };
    // struct bpf_cgroup_dev_ctx: access << 16 | kind, major, minor.
    let mut program = vec![
        op(LOAD_WORD, KIND, SCRATCH, 0, 0),
        op(MOVE_REGISTER, ACCESS, KIND, 0, 0),
        op(AND, KIND, 0, 0, 0xffff),
        op(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        op(LOAD_WORD, MAJOR, SCRATCH, 4, 0),
        op(LOAD_WORD, MINOR, SCRATCH, 8, 0),
    ];
    for rule in rules.iter().chain(&ALWAYS).rev() {
        let mut test = Vec::new();
        for (register, value) in [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)] {
            if let Some(value) = value {
                test.push(op(JUMP_IF_NOT_EQUAL, register, 0, 0, value));
            }
        }
        if rule.access != EVERYTHING {
            test.push(op(MOVE_REGISTER, SCRATCH, ACCESS, 0, 0));
            if rule.allow {
                // All of what is wanted has to be allowed.
                test.push(op(AND, SCRATCH, 0, 0, !rule.access));
                test.push(op(JUMP_IF_NOT_EQUAL, SCRATCH, 0, 0, 0));
            } else {
                // Any of it that is denied is enough.
                test.push(op(AND, SCRATCH, 0, 0, rule.access));
                test.push(op(JUMP_IF_EQUAL, SCRATCH, 0, 0, 0));
            }
        }
        test.push(op(MOVE, ANSWER, 0, 0, i32::from(rule.allow)));
        test.push(op(EXIT, 0, 0, 0, 0));
        // A test that fails leads behind this rule. A rule has 10 instructions at most.
        let length = test.len();
        for (place, instruction) in test.iter_mut().enumerate() {
            if matches!(instruction.code, JUMP_IF_EQUAL | JUMP_IF_NOT_EQUAL) {
                instruction.offset = i16::try_from(length - place - 1).unwrap_or(i16::MAX);
            }
        }
        program.extend(test);
        if rule.is_for_all() {
            // The verifier refuses what cannot be reached.
            return Some(program);
        }
    }
    program.push(op(MOVE, ANSWER, 0, 0, 0));
    program.push(op(EXIT, 0, 0, 0, 0));
    Some(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would.
    fn run(program: &[Instruction], kind: i32, major: i32, minor: i32, access: i32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0_i32; 6];
        let mut next = 0;
        loop {
            let Instruction {
                code,
                registers: which,
                offset,
                immediate,
            } = program[next];
            let (to, from) = (usize::from(which & 15), usize::from(which >> 4));
            next += 1;
            let jump = match code {
                LOAD_WORD => {
                    registers[to] = context[usize::try_from(offset).unwrap() / 4];
                    false
                }
                AND => {
                    registers[to] &= immediate;
                    false
                }
                SHIFT_RIGHT => {
                    registers[to] >>= immediate;
                    false
                }
                MOVE => {
                    registers[to] = immediate;
                    false
                }
                MOVE_REGISTER => {
                    registers[to] = registers[from];
                    false
                }
                JUMP_IF_EQUAL => registers[to] == immediate,
                JUMP_IF_NOT_EQUAL => registers[to] != immediate,
                EXIT => return registers[0] == 1,
                _ => panic!("unknown instruction {code:#x}"),
            };
            if jump {
                next += usize::try_from(offset).unwrap();
            }
        }
    }

    fn rules(json: &str) -> Vec<LinuxDeviceCgroup> {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn rules_decide_from_last_to_first() {
        let program = program(&rules(
            r#"[{"allow": true, "type": "b", "major": 8, "access": "rwm"},
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"},
                {"allow": true, "type": "b", "major": 254, "access": "rw"},
                {"allow": false, "type": "b", "major": 254, "minor": 3, "access": "w"}]"#,
        ))
        .unwrap();
        let may = |kind, major, minor, access| run(&program, kind, major, minor, access);
        assert!(may(CHARACTER, 10, 229, READ | WRITE));
        assert!(!may(BLOCK, 10, 229, READ));
        // Before the rule that denies all: it does not count.
        assert!(!may(BLOCK, 8, 0, READ));
        assert!(may(BLOCK, 254, 0, READ | WRITE));
        assert!(may(BLOCK, 254, 3, READ));
        assert!(!may(BLOCK, 254, 3, READ | WRITE));
        // What everybody may.
        assert!(may(CHARACTER, 1, 3, READ | WRITE));
        assert!(may(CHARACTER, 136, 7, WRITE));
        assert!(may(BLOCK, 8, 0, MKNOD));
        assert!(!may(BLOCK, 8, 0, MKNOD | READ));
    }

    #[test]
    fn without_rules_only_the_defaults_are_there() {
        let program = program(&[]).unwrap();
        assert!(run(&program, CHARACTER, 1, 9, READ));
        assert!(!run(&program, CHARACTER, 1, 1, READ));
    }

    #[test]
    fn a_privileged_container_needs_no_program() {
        let all = r#"[{"allow": false, "access": "rwm"}, {"allow": true, "access": "rwm"}]"#;
        assert_eq!(program(&rules(all)), None);
        let typed = r#"[{"allow": true, "type": "a", "access": "rwm"}]"#;
        assert_eq!(program(&rules(typed)), None);
    }
}
