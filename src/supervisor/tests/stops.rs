//! Drain, stop and abort.

use super::*;

#[test]
fn a_draining_worker_is_signalled_when_its_last_connection_ends() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    assert_eq!(world.apply(1, [ports("a", &[9002])]), ["publish web", "retire 2", "answer 1"]);
    world.wait(SEC(10));
    assert_eq!(world.idle(2), ["SIGTERM 2"]);
    assert_eq!(world.idle(2), [""; 0], "once");
    world.wait(MS(9_900));
    assert_eq!(world.end(2), [""; 0]);
    assert!(matches!(world.facts.last(), Some(Fact::Stopped { .. })));
    assert_eq!(world.web().retiring.len(), 0);
}

#[test]
fn a_drain_ends_at_its_timeout_and_a_stop_with_a_kill() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    world.apply(1, [ports("a", &[9002])]);
    assert!(!world.wait(MS(29_999)).contains(&"SIGTERM 2".to_owned()));
    assert_eq!(world.wait(MS(1)), ["SIGTERM 2"]);
    assert_eq!(world.wait(MS(9_999)), [""; 0]);
    assert_eq!(world.wait(MS(1)), ["kill 2"]);
    assert_eq!(world.wait(SEC(100)), [""; 0], "once");
    assert_eq!(world.gone(2), [""; 0]);
}

#[test]
fn a_server_that_drains_itself_is_signalled_at_once() {
    let mut config = ports("a", &[9002, 9003]);
    config.stop.drain = Drain::Signal;
    let mut world = World::healthy(config.clone());
    config.slots = Slots::Ports(vec![9002]);
    assert_eq!(world.apply(1, [config]), ["publish web", "retire 2", "SIGTERM 2", "answer 1"]);
}

#[test]
fn a_worker_that_does_not_run_yet_gets_its_signal_when_it_does() {
    let mut world = World::begin(ports("a", &[9002, 9003]));
    assert_eq!(world.apply(1, [ports("a", &[9002])]), ["retire 2", "answer 1"]);
    assert_eq!(world.started(2), ["SIGTERM 2"]);
    assert_eq!(world.wait(SEC(10)), ["kill 2"]);
}

#[test]
fn a_stop_first_empties_the_listeners() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    assert_eq!(world.event(Event::Stop), ["close web"]);
    assert_eq!(world.rotation(), [1, 2], "they serve until the queue is empty");
    assert_eq!(world.event(Event::Stop), [""; 0]);
    assert_eq!(world.closed(), ["publish web", "retire 1", "retire 2"]);
    assert_eq!(world.closed(), [""; 0]);
    assert_eq!(world.idle(2), ["SIGTERM 2"]);
    assert_eq!(world.end(2), [""; 0]);
    assert_eq!(world.idle(1), ["SIGTERM 1"]);
    assert_eq!(world.exit(1), [""; 0]);
    assert_eq!(world.gone(1), ["forget web", "finished"]);
    assert_eq!(world.event(Event::Stop), [""; 0], "finished once");
    assert_eq!(world.event(Event::Abort), [""; 0]);
}

#[test]
fn a_vacant_slot_is_filled_until_the_listeners_are_empty() {
    // Clients that are held while none is healthy have been promised one that is due.
    let mut world = World::healthy(ports("a", &[9002]));
    world.event(Event::Stop);
    assert_eq!(world.end(1), ["publish web"]);
    assert!(matches!(world.facts.last(), Some(Fact::Down { restart_in: Some(_), .. })));
    assert!(matches!(world.coming(), Coming::At(_)));
    assert_eq!(world.wait(MS(100)), ["publish web", "spawn 2 a on 9002"]);
    assert_eq!(world.up(2), ["publish web"]);
    assert_eq!(world.rotation(), [2]);
    assert_eq!(world.closed(), ["publish web", "retire 2"]);
    world.idle(2);
    assert_eq!(world.end(2), ["forget web", "finished"]);
}

#[test]
fn nothing_is_started_once_the_listeners_are_empty() {
    let mut world = World::healthy(ports("a", &[9002]));
    world.event(Event::Stop);
    world.end(1);
    assert_eq!(world.closed(), ["forget web", "finished"]);
    assert_eq!(world.wait(SEC(100)), [""; 0]);
}

#[test]
fn a_service_that_was_removed_is_not_filled_again_since_lbd_stops() {
    let api = service("api", "a", Slots::Ports(vec![9002]));
    let mut world = World::healthy(ports("a", &[9002]));
    world.apply(1, [api]);
    assert!(
        world.end(1).ends_with(&["spawn 2 a on 9002".to_owned()]),
        "the port is the other one's"
    );
    assert_eq!(world.coming(), Coming::Never);
    world.event(Event::Stop);
    assert_eq!(world.coming(), Coming::Never);
    assert_eq!(world.wait(SEC(10)), [""; 0]);
    assert_eq!(world.spawns.len(), 2);
}

#[test]
fn a_replacement_is_kept_where_a_stop_finds_nothing_else() {
    let mut world = World::healthy(count("a", 1));
    world.restart(1, None);
    world.end(1);
    assert_eq!(world.event(Event::Stop), ["answer 1: lbd is stopping", "close web"]);
    assert_eq!(world.coming(), Coming::Now);
    assert_eq!(world.up(2), ["publish web"]);
    assert_eq!(world.rotation(), [2]);
}

#[test]
fn a_stop_refuses_what_is_asked_for_later() {
    let mut world = World::healthy(ports("a", &[9002]));
    world.event(Event::Stop);
    assert_eq!(world.apply(1, [ports("a", &[9002])]), ["answer 1: lbd is stopping"]);
    assert_eq!(world.restart(2, None), ["answer 2: lbd is stopping"]);
    assert_eq!(world.restart(3, Some("web")), ["answer 3: lbd is stopping"]);
}

#[test]
fn a_stop_of_nothing_is_finished_at_once() {
    let mut supervisor = Supervisor::new(1);
    assert_eq!(supervisor.handle(Event::Stop, Instant::now()), [Effect::Finished]);
}

#[test]
fn an_abort_kills_in_every_phase() {
    // Slots: healthy, unhealthy, starting, launching, in backoff, ended and not gone, draining,
    // stopping.
    let all: Vec<u16> = (9002..9010).collect();
    let mut world = World::begin(ports("a", &all));
    for id in [1, 2, 7, 8] {
        world.up(id);
    }
    world.fall(2);
    world.started(3);
    world.end(5);
    world.exit(6);
    world.apply(1, [ports("a", &all[..6])]);
    world.idle(8);
    let killed = world.event(Event::Abort);
    let expected = ["publish web", "kill 7", "kill 8", "kill 1", "kill 2", "kill 3", "kill 4"];
    assert_eq!(killed, expected);
    assert_eq!((world.rotation(), world.coming()), (vec![], Coming::Never));
    assert_eq!(world.event(Event::Abort), [""; 0]);
    for id in [1, 2, 3, 4, 6, 7] {
        assert_eq!(world.end(id), [""; 0]);
    }
    assert_eq!(world.wait(SEC(100)), [""; 0]);
    assert_eq!(world.gone(8), ["forget web", "finished"]);
}

#[test]
fn a_second_signal_cuts_a_graceful_stop_short() {
    for closed in [false, true] {
        let mut world = World::healthy(ports("a", &[9002]));
        world.event(Event::Stop);
        if closed {
            world.closed();
        }
        assert_eq!(world.event(Event::Abort).last().map(|s| &**s), Some("kill 1"));
        assert_eq!(world.closed(), [""; 0]);
        assert_eq!(world.end(1), ["forget web", "finished"]);
    }
}

#[test]
fn an_abort_of_what_does_not_run_is_over_at_once() {
    let mut world = World::begin(ports("a", &[9002]));
    world.fail_to_start(1);
    assert_eq!(world.event(Event::Abort), ["forget web", "finished"]);
}

#[test]
fn an_abort_answers_who_waits() {
    let mut world = World::healthy(count("a", 1));
    world.restart(1, None);
    let expected = ["publish web", "answer 1: lbd is stopping", "kill 1", "kill 2"];
    assert_eq!(world.event(Event::Abort), expected);
}
