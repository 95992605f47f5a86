//! Ends and restarts.

use super::*;

#[test]
fn an_exit_takes_the_worker_out_of_rotation_at_once() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    assert_eq!(world.exit(1), ["publish web"]);
    assert_eq!(world.rotation(), [2]);
    let due = world.now + MS(100);
    assert_eq!(world.coming(), Coming::At(due));
    assert_eq!(world.gone(1), [""; 0]);
    assert_eq!(world.supervisor.deadline(), Some(due));
    assert_eq!(world.wait(MS(100)), ["publish web", "spawn 3 a on 9002"]);
    assert_eq!(world.coming(), Coming::Now);
    world.spawned(3);
    let slot = &world.web().slots[0];
    assert_eq!((slot.generation, slot.restarts), (2, 1));
    let last = slot.last_exit.as_ref().map(|exit| exit.how.to_string());
    assert_eq!(last.as_deref(), Some("exit status 1"));
}

#[test]
fn a_fixed_port_waits_until_nothing_of_its_last_worker_is_left() {
    let mut world = World::healthy(ports("a", &[9002]));
    world.exit(1);
    assert_eq!(world.wait(SEC(5)), [""; 0]);
    assert_eq!(world.supervisor.deadline(), None, "only an event can help");
    assert!(matches!(world.coming(), Coming::At(at) if at < world.now));
    assert_eq!(world.gone(1), ["publish web", "spawn 2 a on 9002"]);
}

#[test]
fn a_free_port_needs_no_waiting() {
    let mut world = World::healthy(count("a", 1));
    world.exit(1);
    assert_eq!(world.wait(MS(100)), ["publish web", "spawn 2 a on any"]);
}

#[test]
fn an_inherited_socket_keeps_its_port_over_a_restart() {
    let mut config = count("a", 1);
    Arc::make_mut(&mut config.worker).socket = SocketMode::Inherit;
    let mut world = World::healthy(config);
    world.exit(1);
    assert_eq!(world.wait(SEC(1)), [""; 0], "the worker before still has it");
    assert_eq!(world.gone(1), ["publish web", "spawn 2 a on 40001"]);
    world.fail_to_start(2);
    assert_eq!(world.wait(MS(100)), ["publish web", "spawn 3 a on any"], "perhaps it is taken");
}

#[test]
fn the_delay_doubles_with_each_failure_and_health_ends_that() {
    let mut config = ports("a", &[9002]);
    config.restart = Restart::default();
    let mut world = World::begin(config);
    for (id, low) in [(1, 100), (2, 200), (3, 400), (4, 800)] {
        world.started(id);
        world.end(id);
        let Some(Fact::Down { restart_in: Some(delay), failures, .. }) = world.facts.last() else {
            panic!("{:?}", world.facts)
        };
        assert_eq!(u64::from(*failures), id);
        assert!((MS(low)..=MS(low * 5 / 4)).contains(delay), "{delay:?}");
        assert_eq!(world.supervisor.deadline(), Some(world.now + *delay));
        let delay = *delay;
        assert_eq!(world.wait(delay).len(), 2);
    }
    world.up(5);
    world.wait(MS(9_999));
    world.end(5);
    let Some(Fact::Down { restart_in: Some(delay), .. }) = world.facts.last() else { panic!() };
    let delay = *delay;
    assert!(delay >= MS(1600), "{delay:?}: not healthy for long enough");
    world.wait(delay);
    world.up(6);
    world.wait(SEC(10));
    world.exit(6);
    assert_eq!(world.gone(6)[1], "spawn 7 a on 9002", "no delay");
    world.started(7);
    assert_eq!(world.end(7), ["publish web"]);
    assert_eq!(world.wait(MS(125))[1], "spawn 8 a on 9002", "but the next one has one again");
}

#[test]
fn a_program_that_can_not_be_started_is_tried_again() {
    let mut world = World::begin(ports("a", &[9002]));
    assert_eq!(world.fail_to_start(1), ["publish web"]);
    let Some(Fact::Down { how, .. }) = world.facts.last() else { panic!() };
    assert_eq!(*how, Down::NotStarted("no such file".to_owned()));
    assert_eq!(world.wait(MS(100)), ["publish web", "spawn 2 a on 9002"]);
}

#[test]
fn a_worker_that_vanishes_without_a_word_is_replaced() {
    let mut world = World::healthy(ports("a", &[9002]));
    assert_eq!(world.gone(1), ["publish web"]);
    assert_eq!(world.wait(MS(100)), ["publish web", "spawn 2 a on 9002"]);
}

#[test]
fn a_port_that_moves_to_another_service_waits_for_its_last_worker() {
    let api = |ports: &[u16]| service("api", "b", Slots::Ports(ports.to_vec()));
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    let shown = world.apply(1, [ports("a", &[9002]), api(&[9003, 9004])]);
    assert_eq!(shown, ["publish web", "publish api", "retire 2", "answer 1", "spawn 3 b on 9004"]);
    assert_eq!(world.idle(2), ["SIGTERM 2"]);
    assert_eq!(world.exit(2), [""; 0]);
    assert_eq!(world.gone(2), ["spawn 4 b on 9003"]);
}

#[test]
fn coming_tells_when_a_worker_can_be_there() {
    let mut world = World::begin(ports("a", &[9002, 9003]));
    assert_eq!(world.coming(), Coming::Now, "launching");
    world.up(1);
    world.up(2);
    assert_eq!(world.coming(), Coming::Never, "all are there");
    world.end(1);
    let first = world.now + MS(100);
    world.now += MS(10);
    world.end(2);
    assert_eq!(world.coming(), Coming::At(first), "the first one counts");
    world.wait(MS(90));
    assert_eq!(world.coming(), Coming::Now);
    world.event(Event::Stop);
    assert_eq!(world.coming(), Coming::Now, "it may still become healthy");
    world.end(3);
    assert!(
        matches!(world.coming(), Coming::At(_)),
        "clients are held until the listeners are empty"
    );
    assert_eq!(world.closed(), ["forget web", "finished"], "nothing is started any more");
}

#[test]
fn each_end_is_counted_once_and_by_its_cause() {
    use crate::supervisor::ExitCause::{self, Exit, NotStarted, Signal, Stopped, Unhealthy};
    let mut counted: Vec<ExitCause> = Vec::new();
    let mut world = World::healthy(stop_first(ports("a", &[9002])));
    let mut counts = |world: &World, cause: ExitCause| {
        counted.push(cause);
        let of = |cause: ExitCause| counted.iter().filter(|known| **known == cause).count() as u64;
        assert_eq!(world.web().slots[0].exits, ExitCause::ALL.map(of), "{cause:?}");
    };
    world.end(1);
    counts(&world, Exit);
    world.wait(SEC(60));
    world.up(2);
    let killed = Event::Exited { id: WorkerId(2), exit: super::Exit::Signal(9), said: Vec::new() };
    world.event(killed);
    world.gone(2);
    counts(&world, Signal);
    world.wait(SEC(60));
    world.fail_to_start(3);
    counts(&world, NotStarted);
    world.wait(SEC(60));
    world.up(4);
    world.gone(4);
    counts(&world, Signal);
    world.wait(SEC(60));
    world.up(5);
    world.fall(5);
    world.wait(SEC(60));
    world.end(5);
    counts(&world, Unhealthy);
    world.up(6);
    world.restart(1, None);
    world.idle(6);
    world.end(6);
    counts(&world, Stopped);
    world.up(7);
    world.restart(2, None);
    // While it drains, before it is asked to.
    world.end(7);
    counts(&world, Exit);
}

#[test]
fn a_port_that_is_taken_is_looked_at_every_other_second() {
    let mut config = ports("a", &[9002]);
    config.restart = Restart::default();
    let mut world = World::begin(config);
    for id in 1..40 {
        world.port_taken(id);
        let Some(Fact::Down { restart_in: Some(delay), failures, how, .. }) = world.facts.last()
        else {
            panic!("{:?}", world.facts)
        };
        assert_eq!((u64::from(*failures), how.kind()), (id, DownKind::NotTried));
        assert!(*delay <= SEC(2), "{delay:?}");
        assert_eq!(world.wait(SEC(2)).last(), Some(&format!("spawn {} a on 9002", id + 1)));
    }
    assert_eq!(world.up(40), ["publish web"], "soon after it is free");
    assert_eq!(world.web().slots[0].restarts, 0, "nothing was started before");
    world.end(40);
    world.wait(Restart::default().max_delay);
    world.port_taken(41);
    world.wait(SEC(2));
    world.up(42);
    assert_eq!(world.web().slots[0].restarts, 1, "nor in between");
}
