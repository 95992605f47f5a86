//! From the start of a program to its place in rotation, and out of it.

use super::*;

#[test]
fn the_first_start_spawns_every_slot_in_order() {
    let mut world = World::begin(ports("a", &[9002, 9003]));
    assert_eq!(world.slots(), [(0, Some(9002), Some(1)), (1, Some(9003), Some(2))]);
    assert_eq!(
        world.spawns.iter().map(|s| (s.slot, s.port)).collect::<Vec<_>>(),
        [(0, Some(9002)), (1, Some(9003))]
    );
    assert_eq!((world.rotation(), world.coming()), (vec![], Coming::Now));
    assert_eq!(world.started(1), [""; 0], "nothing is published before a probe passed");
    assert_eq!(world.phase(1), Some(Phase::Starting));
    assert_eq!(world.supervisor.deadline(), Some(world.now), "the first probe is due at once");
    assert_eq!(world.wait(MS(0)), ["probe 1"]);
}

#[test]
fn one_pass_brings_a_worker_into_rotation() {
    let mut world = World::begin(ports("a", &[9002, 9003]));
    world.started(2);
    assert_eq!(world.pass(2), ["publish web"]);
    assert_eq!(world.rotation(), [2]);
    world.started(1);
    world.wait(MS(30));
    assert_eq!(world.pass(1), ["publish web"]);
    assert_eq!(world.rotation(), [1, 2], "in the order of the configuration");
    assert_eq!(world.facts.last(), Some(&Fact::Healthy { after: Some(MS(30)) }));
}

#[test]
fn rise_passes_in_a_row_are_needed() {
    let mut config = ports("a", &[9002]);
    config.health.rise = NonZeroU32::new(2).unwrap();
    let mut world = World::begin(config);
    world.started(1);
    assert_eq!(world.pass(1), [""; 0]);
    assert_eq!(world.fail(1), [""; 0]);
    assert_eq!(world.pass(1), [""; 0]);
    assert_eq!(world.rotation(), [0; 0]);
    assert_eq!(world.pass(1), ["publish web"]);
}

#[test]
fn a_new_worker_is_probed_again_soon_and_its_failures_are_no_news() {
    let mut world = World::begin(ports("a", &[9002]));
    world.started(1);
    let mut pauses = Vec::new();
    for _ in 0..9 {
        assert_eq!(world.fail(1), [""; 0]);
        let next = world.supervisor.deadline().unwrap();
        pauses.push((next - world.now).as_millis());
    }
    assert_eq!(pauses, [20, 40, 80, 160, 320, 640, 1000, 1000, 1000]);
    assert_eq!(world.phase(1), Some(Phase::Starting));
    assert!(world.facts.iter().all(|fact| !matches!(fact, Fact::Unhealthy { .. })));
}

#[test]
fn a_healthy_worker_is_probed_every_interval_from_start_to_start() {
    let mut world = World::healthy(ports("a", &[9002]));
    assert_eq!(world.wait(MS(999)), [""; 0]);
    assert_eq!(world.wait(MS(1)), ["probe 1"]);
    world.now += MS(700);
    world.answer_probe(1, None);
    assert_eq!(world.wait(MS(299)), [""; 0]);
    assert_eq!(world.wait(MS(1)), ["probe 1"]);
    world.now += SEC(3);
    world.answer_probe(1, None);
    assert_eq!(world.wait(MS(0)), ["probe 1"], "one at a time, however long it takes");
}

#[test]
fn a_worker_that_is_not_healthy_in_time_is_killed_and_counts_as_failed() {
    let mut world = World::begin(ports("a", &[9002]));
    world.started(1);
    world.fail(1);
    let shown = world.wait(SEC(60));
    assert_eq!(shown, ["probe 1", "publish web", "kill 1"]);
    let Some(Fact::Down { how, restart_in, failures, .. }) = world.facts.last() else {
        panic!("{:?}", world.facts)
    };
    assert_eq!(*how, Down::NotHealthy("not healthy within 1m: connection refused".to_owned()));
    assert_eq!((*restart_in, *failures), (Some(MS(100)), 1));
    assert_eq!(world.gone(1), [""; 0]);
    assert_eq!(world.wait(MS(100)), ["publish web", "spawn 2 a on 9002"]);
}

#[test]
fn a_program_that_never_runs_is_killed_in_time_too() {
    let mut world = World::begin(ports("a", &[9002]));
    assert_eq!(world.wait(SEC(60)), ["publish web", "kill 1"]);
}

#[test]
fn the_start_timeout_counts_from_the_start_of_the_program() {
    let mut world = World::begin(ports("a", &[9002]));
    world.wait(SEC(50));
    world.started(1);
    world.fail(1);
    assert!(!world.wait(MS(59_999)).contains(&"kill 1".to_owned()));
    assert_eq!(world.wait(MS(1)), ["publish web", "kill 1"]);
}

#[test]
fn fall_failures_in_a_row_take_a_worker_out_and_rise_passes_bring_it_back() {
    let mut config = ports("a", &[9002, 9003]);
    config.health.rise = NonZeroU32::new(2).unwrap();
    let mut world = World::begin(config);
    for id in [1, 2] {
        world.started(id);
        world.pass(id);
        world.pass(id);
    }
    assert_eq!(world.fail(1), [""; 0]);
    assert_eq!(world.fail(1), [""; 0]);
    assert_eq!(world.pass(1), [""; 0]);
    assert_eq!(world.fall(1), ["publish web"]);
    assert_eq!((world.phase(1), world.rotation()), (Some(Phase::Unhealthy), vec![2]));
    assert_eq!(world.pass(1), [""; 0]);
    assert_eq!(world.pass(1), ["publish web"]);
    assert_eq!((world.phase(1), world.rotation()), (Some(Phase::Healthy), vec![1, 2]));
    assert_eq!(world.facts.last(), Some(&Fact::Healthy { after: None }));
}

#[test]
fn health_before_a_worker_hung_counts_for_the_reset_of_its_backoff() {
    let mut world = World::healthy(ports("a", &[9002]));
    for _ in 0..9 {
        world.pass(1);
    }
    world.wait(SEC(2));
    world.answer_probe(1, Some("timed out"));
    world.fail(1);
    world.fail(1);
    assert_eq!(world.phase(1), Some(Phase::Unhealthy));
    world.end(1);
    let Some(Fact::Down { restart_in, .. }) = world.facts.last() else { panic!() };
    assert_eq!(*restart_in, Some(MS(0)));
    assert_eq!(world.spawns.len(), 2);
}

#[test]
fn a_probe_of_the_incarnation_before_says_nothing_of_this_one() {
    let mut world = World::healthy(ports("a", &[9002]));
    world.wait(SEC(1));
    world.end(1);
    world.wait(MS(100));
    world.started(2);
    assert_eq!(world.answer_probe(1, None), [""; 0]);
    assert_eq!((world.phase(2), world.rotation()), (Some(Phase::Starting), vec![]));
}

#[test]
fn a_draining_worker_stays_out_of_rotation_however_well_it_answers() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    world.wait(SEC(1));
    world.apply(1, [ports("a", &[9002])]);
    let draining = world.phase(2);
    assert!(matches!(draining, Some(Phase::Draining { .. })));
    assert_eq!(world.answer_probe(2, None), [""; 0]);
    assert_eq!(world.answer_probe(2, None), [""; 0], "nobody asked for a second answer");
    assert_eq!((world.phase(2), world.rotation()), (draining, vec![1]));
    assert!(!world.wait(SEC(20)).contains(&"probe 2".to_owned()));
}

#[test]
fn a_probe_asked_for_before_a_drain_is_not_asked_for_again_and_does_not_count() {
    let mut config = ports("a", &[9002, 9003]);
    config.health.fall = NonZeroU32::MIN;
    let mut world = World::healthy(config.clone());
    world.wait(SEC(1));
    let mut fewer = config.clone();
    fewer.slots = Slots::Ports(vec![9002]);
    world.apply(1, [fewer]);
    world.apply(2, [config]);
    assert_eq!(world.wait(MS(0)), [""; 0], "it is still being probed");
    assert_eq!(world.answer_probe(2, Some("drained")), [""; 0]);
    assert_eq!(world.rotation(), [1, 2]);
    assert_eq!(world.wait(MS(0)), ["probe 2"]);
    assert_eq!(world.answer_probe(2, Some("refused")), ["publish web"]);
    assert_eq!(world.rotation(), [1]);
}

#[test]
fn what_says_nothing_of_a_worker_changes_neither_rise_nor_fall() {
    let unknown = || Verdict::Unknown("no descriptor is left".to_owned());
    let mut config = ports("a", &[9002]);
    config.health.rise = NonZeroU32::new(2).unwrap();
    let mut world = World::begin(config.clone());
    let judge = |world: &mut World, verdict| {
        while !world.probing.contains(&1) {
            let deadline = world.supervisor.deadline().unwrap();
            world.wait(deadline.saturating_duration_since(world.now));
        }
        world.judge_probe(1, verdict)
    };
    world.started(1);
    judge(&mut world, Verdict::Passed);
    assert_eq!(judge(&mut world, unknown()), [""; 0]);
    assert_eq!(world.phase(1), Some(Phase::Starting));
    assert_eq!(judge(&mut world, Verdict::Passed), ["publish web"], "the second in a row");
    for _ in 0..2 {
        assert_eq!(world.fail(1), [""; 0]);
        for _ in 0..10 {
            assert_eq!(judge(&mut world, unknown()), [""; 0]);
        }
    }
    // A stricter rule is for the next failure to meet.
    config.health.fall = NonZeroU32::MIN;
    world.apply(1, [config]);
    assert_eq!(judge(&mut world, unknown()), [""; 0]);
    assert_eq!(world.rotation(), [1]);
    assert_eq!(world.fail(1), ["publish web"], "the third in a row");
}

#[test]
fn a_start_that_is_hopeless_is_given_up_at_once() {
    let hopeless = || Verdict::Hopeless("it listens on port 3000".to_owned());
    let mut world = World::begin(ports("a", &[9002]));
    world.started(1);
    world.wait(MS(0));
    assert_eq!(world.judge_probe(1, hopeless()), ["publish web", "kill 1"]);
    let Some(Fact::Down { how, restart_in: Some(_), .. }) = world.facts.last() else {
        panic!("{:?}", world.facts)
    };
    assert_eq!(*how, Down::NotHealthy("it listens on port 3000".to_owned()));
    world.gone(1);
    assert_eq!(world.wait(MS(100)), ["publish web", "spawn 2 a on 9002"]);
    // One that was healthy once has as many failures as any other.
    world.up(2);
    for expected in [&[][..], &[], &["publish web".to_owned()]] {
        world.wait(SEC(1));
        assert_eq!(world.judge_probe(2, hopeless()), expected);
    }
    assert_eq!(world.phase(2), Some(Phase::Unhealthy));
}

#[test]
fn a_worker_that_is_not_healthy_after_five_seconds_is_told_of_once() {
    let mut world = World::begin(ports("a", &[9002]));
    world.started(1);
    let late = |world: &World| {
        let is_late = |fact: &&Fact| matches!(fact, Fact::NotYetHealthy { .. });
        world.facts.iter().filter(is_late).count()
    };
    let began = world.now;
    while world.now - began < SEC(5) {
        assert_eq!(late(&world), 0);
        world.fail(1);
    }
    let Some(Fact::NotYetHealthy { error, after }) = world.facts.last() else {
        panic!("{:?}", world.facts)
    };
    assert_eq!((&**error, *after), ("connection refused", world.now - began));
    for _ in 0..30 {
        world.fail(1);
    }
    assert_eq!(late(&world), 1);
}
