//! Changes of a JSON document that leave its values of their kinds: bytes that are changed by chance are
//! seldom JSON, and those that are seldom what a document of this kind is.

use serde_json::Value;

use crate::input::Input;

/// Most changes of one document, and the number of values beyond which it grows no more.
const CHANGES: usize = 32;
const VALUES: usize = 4096;

/// Texts that mean something to somebody.
const TEXTS: [&str; 24] = [
    "",
    "/",
    "..",
    "/../../etc/passwd",
    "/proc/self/root",
    "/proc/1/ns/net",
    "/run/sepal/x",
    "/dev/kvm",
    "/dev/null",
    "a\0b",
    "a:b:c",
    "0-3,7",
    "4294967296",
    "-1",
    "rw",
    "rro",
    "rbind",
    "rshared",
    "bind",
    "cgroup",
    "tmpfs",
    "user",
    "sandbox",
    "\u{202e}\u{fffd}",
];
const NUMBERS: [i64; 10] = [
    0,
    1,
    -1,
    7,
    i32::MAX as i64,
    u32::MAX as i64,
    u32::MAX as i64 + 1,
    i64::MAX,
    i64::MIN,
    1 << 40,
];

/// The document with the changes that the input tells, up to its end.
pub fn changed(mut document: Value, input: &mut Input) -> Value {
    for _ in 0..CHANGES {
        if input.is_empty() {
            break;
        }
        let count = values(&document);
        let mut number = usize::from(input.u16()) % count;
        if let Some(value) = nth(&mut document, &mut number) {
            change(value, count < VALUES, input);
        }
    }
    document
}

fn values(value: &Value) -> usize {
    let within: usize = match value {
        Value::Array(array) => array.iter().map(values).sum(),
        Value::Object(object) => object.values().map(values).sum(),
        _ => 0,
    };
    1 + within
}

/// The value of this number, counted from the outside inwards.
fn nth<'a>(value: &'a mut Value, number: &mut usize) -> Option<&'a mut Value> {
    if *number == 0 {
        return Some(value);
    }
    *number -= 1;
    match value {
        Value::Array(array) => array.iter_mut().find_map(|value| nth(value, number)),
        Value::Object(object) => object.values_mut().find_map(|value| nth(value, number)),
        _ => None,
    }
}

fn change(value: &mut Value, may_grow: bool, input: &mut Input) {
    match value {
        Value::Null => {}
        Value::Bool(flag) => *flag = !*flag,
        Value::Number(number) => {
            *number = match input.below(NUMBERS.len() + 2) {
                which if which < NUMBERS.len() => NUMBERS[which].into(),
                which if which == NUMBERS.len() => u64::MAX.into(),
                _ => input.u32().into(),
            };
        }
        Value::String(text) => {
            *text = match input.below(TEXTS.len() + 2) {
                which if which < TEXTS.len() => TEXTS[which].into(),
                which if which == TEXTS.len() => text.repeat(2),
                _ => String::from_utf8_lossy(&input.some()).into(),
            };
        }
        Value::Array(array) if !array.is_empty() => {
            let which = input.below(array.len());
            match input.byte() % 3 {
                0 => drop(array.remove(which)),
                1 if may_grow => array.push(array[which].clone()),
                _ => array.rotate_left(which),
            }
        }
        Value::Object(object) => {
            let which = input.below(object.len());
            let key = object.keys().nth(which).cloned();
            match input.byte() % 3 {
                0 => drop(key.and_then(|key| object.remove(&key))),
                1 if may_grow => {
                    let name = String::from_utf8_lossy(&input.some()).into_owned();
                    if let Some(value) = key.and_then(|key| object.get(&key).cloned()) {
                        object.insert(name, value);
                    }
                }
                _ => {}
            }
        }
        Value::Array(_) => {}
    }
}
