//! One stream, whatever the guest and the program at its other end do in whatever order.
//!
//! With [`Device`] the rings, the worker and the kernel are between what is done and what comes of it.
//! With [`Alone`] one thing happens after another, so that more can be said of when, and counters wrap.

use std::net::Shutdown;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::packet::{MAX_PAYLOAD, Op, SHUTDOWN_BOTH};
use super::vsock_model_test_stream::{Step, Stream};
use super::vsock_model_test_wires::{Alone, Device, Setup};
use crate::virtio::testing::cases;

fn length(most: usize) -> impl Strategy<Value = usize> {
    prop_oneof![4 => 0..3000_usize, 2 => 0..=most]
}

fn window() -> impl Strategy<Value = u32> {
    prop_oneof![
        1 => Just(0),
        3 => 1..20_000_u32,
        3 => Just(256 * 1024),
        1 => Just(u32::MAX),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let guest = prop_oneof![
        10 => length(MAX_PAYLOAD).prop_map(Step::Send),
        1 => Just(Step::Flood),
        8 => prop_oneof![1..4_usize, Just(1000)].prop_map(Step::Hear),
        6 => length(200_000).prop_map(Step::Take),
        1 => window().prop_map(Step::Window),
        5 => Just(Step::Tell),
        1 => Just(Step::Ask),
        1 => Just(Step::Lie),
    ];
    let program = prop_oneof![
        1 => length(300_000).prop_map(Step::Write),
        1 => length(300_000).prop_map(Step::Read),
    ];
    let end = prop_oneof![
        3 => (1..=SHUTDOWN_BOTH).prop_map(Step::GuestShuts),
        1 => Just(Step::GuestResets),
        2 => length(MAX_PAYLOAD).prop_map(Step::Overrun),
        1 => select(&[Op::Data, Op::Request, Op::Response][..]).prop_map(Step::Nonsense),
        3 => select(&[Shutdown::Read, Shutdown::Write, Shutdown::Both][..])
            .prop_map(Step::ProgramShuts),
        1 => Just(Step::ProgramCloses),
    ];
    prop_oneof![60 => guest, 40 => program, 3 => end]
}

fn setup() -> impl Strategy<Value = Setup> {
    let counted = prop_oneof![
        1 => Just(0),
        4 => prop_oneof![0..3000_u32, 0..200_000_u32].prop_map(|before| u32::MAX - before),
        1 => any::<u32>(),
    ];
    let buffer = || prop_oneof![Just(0_usize), Just(200_000)];
    let room = prop_oneof![1 => 1..200_usize, 3 => Just(4096 - 44), 2 => Just(2 * MAX_PAYLOAD)];
    let piece = prop_oneof![100..5000_usize, Just(MAX_PAYLOAD)];
    let buffers = (buffer(), buffer());
    (any::<bool>(), window(), counted, buffers, room, piece).prop_map(
        |(guest_dials, window, counted, buffers, room, piece)| Setup {
            guest_dials,
            window,
            counted,
            buffers,
            room,
            piece,
        },
    )
}

proptest! {
    #![proptest_config(cases(160))]

    #[test]
    fn a_connection_loses_doubles_and_swaps_nothing_when_its_counters_wrap(
        setup in setup(),
        steps in vec(step(), 0..80),
    ) {
        let window = setup.window;
        Stream::new(Alone::new(setup), window).run(&steps);
    }
}

proptest! {
    #![proptest_config(cases(40))]

    #[test]
    fn a_stream_through_the_device_loses_doubles_and_swaps_nothing(
        buffers in prop_oneof![1..4_usize, Just(64)],
        window in window(),
        guest_dials: bool,
        steps in vec(step(), 0..80),
    ) {
        Stream::new(Device::new(buffers, window, guest_dials), window).run(&steps);
    }
}
