//! Runs the assembled filters in an interpreter of the few operations they use.

use super::*;

fn run(program: &[Instruction], kind: i32, access: i32, major: i32, minor: i32) -> bool {
    let context = [access << 16 | kind, major, minor];
    let mut registers = [0_i32; 6];
    let mut at = 0;
    for _ in 0..program.len() {
        let i = program[at];
        let (destination, source) = ((i.registers & 15) as usize, (i.registers >> 4) as usize);
        at += 1;
        match i.code {
            LOAD_WORD => registers[destination] = context[i.offset as usize / 4],
            MOVE_REGISTER => registers[destination] = registers[source],
            MOVE => registers[destination] = i.immediate,
            AND => registers[destination] &= i.immediate,
            SHIFT_RIGHT => registers[destination] >>= i.immediate,
            JUMP_IF if registers[destination] == i.immediate => at += i.offset as usize,
            JUMP_IF_NOT if registers[destination] != i.immediate => at += i.offset as usize,
            JUMP_IF | JUMP_IF_NOT => {}
            EXIT => return registers[0] == 1,
            code => panic!("operation {code:#x}"),
        }
    }
    panic!("no end")
}

fn rules(json: &str) -> Vec<Rule> {
    let parsed: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
    parsed.iter().map(|rule| parse(rule).unwrap()).collect()
}

#[test]
fn default_is_deny() {
    let program = assemble(&[]);
    assert!(!run(&program, CHAR, READ, 1, 3));
}

#[test]
fn what_containerd_sends() {
    let mut all =
        rules(r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":10,"minor":229,"access":"rw"}]"#);
    all.extend(ALWAYS);
    let program = assemble(&all);
    assert!(run(&program, CHAR, READ | WRITE, 1, 3));
    assert!(run(&program, CHAR, READ | WRITE, 10, 229));
    assert!(run(&program, CHAR, READ | WRITE, 136, 77));
    assert!(run(&program, BLOCK, MKNOD, 8, 0));
    assert!(!run(&program, BLOCK, READ, 8, 0));
    assert!(!run(&program, BLOCK, READ | MKNOD, 8, 0));
    assert!(!run(&program, CHAR, READ, 1, 1), "/dev/mem");
}

#[test]
fn last_word_per_bit() {
    let all = rules(
        r#"[{"allow":true,"type":"a","access":"rwm"},{"allow":false,"type":"b","access":"w"},
            {"allow":true,"type":"b","major":8,"access":"w"},{"allow":false,"type":"b","major":8,"minor":1,"access":"rw"}]"#,
    );
    let program = assemble(&all);
    assert!(run(&program, CHAR, READ | WRITE | MKNOD, 1, 1));
    assert!(run(&program, BLOCK, READ, 9, 0));
    assert!(!run(&program, BLOCK, READ | WRITE, 9, 0));
    assert!(run(&program, BLOCK, READ | WRITE, 8, 0));
    assert!(!run(&program, BLOCK, READ, 8, 1));
    assert!(run(&program, BLOCK, MKNOD, 8, 1));
}

#[test]
fn two_rules_together_allow_both_bits() {
    let program = assemble(&rules(
        r#"[{"allow":true,"type":"c","major":1,"minor":3,"access":"r"},{"allow":true,"type":"c","major":1,"minor":3,"access":"w"}]"#,
    ));
    assert!(run(&program, CHAR, READ | WRITE, 1, 3));
    assert!(!run(&program, CHAR, READ | MKNOD, 1, 3));
}

#[test]
fn bad_rules_are_refused() {
    for json in
        [r#"{"allow":true,"access":"x"}"#, r#"{"allow":true,"major":-2}"#, r#"{"allow":true,"minor":4294967296}"#]
    {
        let rule: LinuxDeviceCgroup = serde_json::from_str(json).unwrap();
        assert!(parse(&rule).is_err(), "{json}");
    }
    let many = vec![LinuxDeviceCgroup::default(); MAX_RULES + 1];
    assert!(matches!(restrict(Path::new("/"), &many), Err(CgroupError::Invalid(_))));
}
